"""The meta device, made quick; it counts multiply-adds and follows the channels.

torch computes the shapes of many operators on the meta device in Python, at 0.1 to 2 ms each, which is most of the
time of a run. Where shape, layout and dtype of a result are plain, a fast path gives them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .channels import follow
from .trail import UNKNOWN, Step, begin, end

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
_BROADCAST = {_aten.add, _aten.sub, _aten.mul, _aten.div}


class MetaOps(TorchDispatchMode):
    """Inside, operators on the meta device take fast paths, multiply-adds are counted by torch's formulas, and the axes of
    channels and batch are followed.

    Args:
        factories: Whether new tensors are made on the meta device, whatever device is asked for. ``torch.device("meta")``
            does nearly the same, at a cost for every operator.

    Attributes:
        macs: Multiply-adds so far.
        written: The storages of the tensors that were written into, in order.
        trail: The operators that ran, in order.
        detailed: Whether the trail says which operators, and on what.
        making: Called before a new tensor is made on the meta device.
        fast: The switch of the fast paths; tests turn it off to compare.
    """

    fast = True

    def __init__(self, *, factories: bool = False) -> None:
        super().__init__()
        self.making: Callable[[], None] | None = None
        self.macs = 0
        self.trail: list[Step] = []
        self.detailed = True
        self.written: list[torch.UntypedStorage] = []  # held, so that no other gets its address
        self.factories = factories

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled inside, and the guard against it costs more than most operators here

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        op = _about(func)
        begun = begin(func, args, kwargs) if self.detailed else None
        for i, name in op.writes:
            value = args[i] if i < len(args) else kwargs.get(name)
            for t in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(t, torch.Tensor):
                    self.written.append(t.untyped_storage())
        first = args[0] if args else None
        out = None
        if isinstance(first, torch.Tensor):
            if self.factories and op.packet is _aten.lift_fresh and not first.is_meta:
                return torch.empty_like(first, device="meta")
            if self.fast and op.fast_path is not None and first.is_meta and first.is_floating_point():
                out = op.fast_path(func, first, args, kwargs)
        elif func is _aten.cat.default and self.fast:
            out = _cat(*args, **kwargs)
        elif self.factories and op.makes_tensor:
            kwargs = {**kwargs, "device": torch.device("meta")}
            if self.making is not None:
                self.making()
        if out is None:
            out = func(*args, **kwargs)
        if op.formula is not None:
            self.macs += _flops(op.formula, args, kwargs, out) // 2
        follow(op.packet, args, out)
        self.trail.append(UNKNOWN if begun is None else end(begun, out))
        return out


_FastPath = Callable[[Any, torch.Tensor, Sequence[Any], dict[str, Any]], Any]


@dataclasses.dataclass(frozen=True)
class _Operator:
    """One operator: the positions and names of the arguments that it writes into, torch's formula for its cost, and the fast
    path to its result, which may give None for some arguments."""

    packet: Any
    writes: tuple[tuple[int, str], ...]
    makes_tensor: bool
    formula: Any
    fast_path: _FastPath | None


@functools.cache
def _about(func: Any) -> _Operator:
    packet = func._overloadpacket
    arguments = func._schema.arguments
    writes = tuple((i, a.name) for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write)
    makes = any(a.name == "device" for a in arguments) and not any("Tensor" in str(a.type) for a in arguments)
    fast_path: _FastPath | None = None
    if any(a.is_out for a in arguments):
        pass  # the result is what it writes into
    elif packet in _IN_PLACE:
        fast_path = _in_place
    elif packet in _LIKE_FIRST:
        fast_path = _broadcast if packet in _BROADCAST else _like_first
    elif packet in _NORMS:
        fast_path = _norm
    elif packet in _BATCH_NORMS:
        fast_path = functools.partial(_batch_norm, _BATCH_NORMS[packet])
    elif func in _REDUCTIONS:
        fast_path = functools.partial(_reduction, _REDUCTIONS[func])
    else:
        fast_path = {_aten.convolution: _convolution, _aten.addmm: _addmm, _aten.roll: _roll}.get(packet)
    return _Operator(packet, writes, makes, flop_registry.get(packet), fast_path)


def _in_place(func: Any, first: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return first if all(_no_larger(a, first) for a in args[1:]) else None


def _like_first(func: Any, first: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return _like(first) if all(_as(a, first) for a in (*args[1:], *kwargs.values())) else None


def _broadcast(func: Any, first: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    out = _like_first(func, first, args, kwargs)
    other = args[1] if len(args) == 2 and not kwargs else None
    if out is not None or not isinstance(other, torch.Tensor) or not other.is_meta or other.dtype != first.dtype:
        return out
    if not (_is_plain(first) and _is_plain(other)):
        return None
    pairs = itertools.zip_longest(reversed(first.shape), reversed(other.shape), fillvalue=1)
    sizes = [m if n == 1 else n if m in (1, n) else -1 for n, m in pairs]
    return None if -1 in sizes else first.new_empty(sizes[::-1])


def _norm(func: Any, first: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return first.new_empty(first.shape), first, first  # the statistics are for the backward alone


def _batch_norm(at: int, func: Any, first: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return (_like(first), first, first) if args[at] is False else None


def _reduction(at: int, func: Any, first: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if kwargs or len(args) <= at or not args[at] or not first.is_contiguous():
        return None
    dims, keep = {d % first.dim() for d in args[at]}, args[at + 1:] == (True,)
    return first.new_empty([1 if d in dims else size for d, size in enumerate(first.shape) if keep or d not in dims])


def _convolution(func: Any, x: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if kwargs or len(args) != 9:
        return None
    weight, _, stride, padding, dilation, transposed, _, groups = args[1:]
    if transposed or not weight.is_meta or weight.dtype != x.dtype or x.shape[1] != weight.shape[1] * groups:
        return None
    if not (len(stride) == len(padding) == len(dilation) == x.dim() - 2 and _is_plain(x) and _is_plain(weight)):
        return None
    sizes = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation)]
    return None if min(sizes) < 1 else x.new_empty((x.shape[0], weight.shape[0], *sizes))


def _addmm(func: Any, first: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if kwargs or not all(a.is_meta for a in args):
        return None
    return args[1].new_empty((args[1].shape[0], args[2].shape[1]))


def _roll(func: Any, first: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return _like(first) if _is_plain(first) else None


def _cat(tensors: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor | None:
    first = tensors[0]
    rest = [list(t.shape) for t in tensors]
    if not first.dim() or any(len(r) != first.dim() for r in rest):
        return None
    width = sum(r.pop(dim) for r in rest)
    if any(r != rest[0] for r in rest) or not all(t.is_meta and t.dtype == first.dtype and _is_plain(t) for t in tensors):
        return None
    rest[0].insert(dim % first.dim(), width)
    return first.new_empty(rest[0])


def _like(t: torch.Tensor) -> torch.Tensor:
    return t.new_empty(t.shape) if _is_plain(t) else torch.empty_like(t)  # which torch answers in Python, on meta


def _is_plain(t: torch.Tensor) -> bool:
    """Whether a tensor is laid out row by row, and is not also a channels_last tensor."""
    return t.is_contiguous() and (not t.dim() or t.stride(-1) == 1)


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
    """The identity of a tensor's memory: that of its views is the same, also on the meta device."""
    where: int = t.untyped_storage()._cdata
    return where


def _flops(formula: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> int:
    """The cost by torch's formula; a formula of shapes is called directly, which spares a walk through the arguments."""
    of_shapes = getattr(formula, "__wrapped__", None)
    if of_shapes is None or isinstance(out, (tuple, list)):
        flops: int = formula(*args, **kwargs, out_val=out)
        return flops
    shapes = [a.shape if isinstance(a, torch.Tensor) else a for a in args]
    named = {k: a.shape if isinstance(a, torch.Tensor) else a for k, a in kwargs.items()}
    flops = of_shapes(*shapes, **named, out_shape=out.shape)
    return flops
