"""The meta device, made quick; multiply-adds are counted on it, and channels followed.

torch finds the shapes of many operators on the meta device in Python, at 0.1 to 2 ms each, which is most of the
time of a run. Where the result is plain, that need not be asked.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .axes import follow

_aten = torch.ops.aten
_LIKE_FIRST = {
    getattr(_aten, name) for name in (
        "add", "sub", "mul", "div", "relu", "gelu", "silu", "sigmoid", "tanh", "hardtanh", "hardswish", "hardsigmoid",
        "leaky_relu", "elu", "mish", "clamp", "clamp_min", "neg", "exp", "rsqrt", "sqrt", "_softmax", "_safe_softmax")
}  # fmt: skip
_IN_PLACE = {
    getattr(_aten, name) for name in (
        "add_", "sub_", "mul_", "div_", "relu_", "silu_", "sigmoid_", "hardtanh_", "hardswish_", "hardsigmoid_",
        "leaky_relu_", "elu_", "mish_", "clamp_", "fill_", "zero_", "normal_", "uniform_", "erfinv_")
}  # fmt: skip
_NORMS = {_aten.native_layer_norm, _aten.native_group_norm}
_BATCH_NORMS = {_aten.native_batch_norm: 5, _aten._native_batch_norm_legit: 5}  # position of `training`
_REDUCTIONS = {_aten.mean.dim: 1, _aten.sum.dim_IntList: 1, _aten.linalg_vector_norm.default: 2}  # position of `dim`


class MetaOps(TorchDispatchMode):
    """Inside, operators on the meta device take short ways, multiply-adds are counted, and channels followed.

    A short way is taken where shape, layout and dtype of the result are plain; torch does the rest, and torch's
    formulas count. `written` grows by the storage of each tensor that is written into. With `factories`, tensors are
    made on the meta device, whatever device is asked for: ``torch.device("meta")`` does nearly the same, but at a cost
    for every operator.
    """

    def __init__(self, *, factories: bool = False) -> None:
        super().__init__()
        self.macs = 0
        self.operators = 0
        self.written: list[torch.UntypedStorage] = []  # held, so that no other gets its address
        self.factories = factories

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled inside, and the guard against it costs more than most operators here

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        kwargs = kwargs or {}
        packet = func._overloadpacket
        for i in _writes(func):
            if i < len(args) and isinstance(args[i], torch.Tensor):
                self.written.append(args[i].untyped_storage())
        first = args[0] if args else None
        if isinstance(first, torch.Tensor):
            out = _short_way(func, packet, first, args, kwargs)
            if out is not None:
                follow(packet, args, out)
                return out
            if self.factories and not first.is_meta and packet is _aten.lift_fresh:
                return torch.empty_like(first, device="meta")
        elif self.factories and _makes_tensor(func):
            kwargs = {**kwargs, "device": torch.device("meta")}
        if packet is _aten.addmm and not kwargs and all(a.is_meta for a in args):
            out = args[1].new_empty((args[1].shape[0], args[2].shape[1]))
        else:
            out = func(*args, **kwargs)
        formula = flop_registry.get(packet)
        if formula is not None:
            self.macs += _flops(formula, args, kwargs, out) // 2
        follow(packet, args, out)
        return out


def _short_way(func: Any, packet: Any, first: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The result of an operator that has a short way, or None."""
    if not first.is_meta or not first.is_floating_point():
        return None
    if packet in _IN_PLACE and all(_no_larger(a, first) for a in args[1:]):
        return first
    if packet in _LIKE_FIRST and all(_as(a, first) for a in (*args[1:], *kwargs.values())):
        return torch.empty_like(first)
    if packet in _NORMS:
        return first.new_empty(first.shape), first, first  # the statistics are for the backward alone
    if packet in _BATCH_NORMS and args[_BATCH_NORMS[packet]] is False:
        return torch.empty_like(first), first, first
    at = _REDUCTIONS.get(func)
    if at is not None and not kwargs and len(args) > at and args[at] and first.is_contiguous():
        dims, keep = {d % first.dim() for d in args[at]}, args[at + 1:] == (True,)
        return first.new_empty([
            1 if d in dims else size for d, size in enumerate(first.shape) if keep or d not in dims])
    return None


def _as(a: Any, first: torch.Tensor) -> bool:
    """Whether an operand leaves the result's shape, layout and dtype those of the first."""
    if not isinstance(a, torch.Tensor):
        return a is None or isinstance(a, (bool, int, float, str))
    if not a.is_meta or a.dtype != first.dtype:
        return False
    if a.shape == first.shape:
        return a.stride() == first.stride()
    return first.is_contiguous() and a.dim() <= first.dim() and all(
        n in (1, m) for n, m in zip(reversed(a.shape), reversed(first.shape)))


def _no_larger(a: Any, first: torch.Tensor) -> bool:
    if not isinstance(a, torch.Tensor):
        return True
    return a.is_meta and (a.shape == first.shape or a.dim() == 0)


def storage(t: torch.Tensor) -> int:
    """What tells whether two tensors share memory: views do, also on the meta device."""
    where: int = t.untyped_storage()._cdata
    return where


@functools.cache
def _writes(func: Any) -> tuple[int, ...]:
    """Which arguments an operator writes into."""
    return tuple(i for i, a in enumerate(func._schema.arguments) if a.alias_info is not None and a.alias_info.is_write)


@functools.cache
def _makes_tensor(func: Any) -> bool:
    """Whether an operator makes a tensor from none."""
    arguments = func._schema.arguments
    return any(a.name == "device" for a in arguments) and not any("Tensor" in str(a.type) for a in arguments)


def _flops(formula: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> int:
    """What torch's formula says; of shapes where it takes them, which spares a walk through the arguments."""
    of_shapes = getattr(formula, "__wrapped__", None)
    if of_shapes is None or isinstance(out, (tuple, list)):
        flops: int = formula(*args, **kwargs, out_val=out)
        return flops
    shapes = [a.shape if isinstance(a, torch.Tensor) else a for a in args]
    named = {k: a.shape if isinstance(a, torch.Tensor) else a for k, a in kwargs.items()}
    flops = of_shapes(*shapes, **named, out_shape=out.shape)
    return flops
