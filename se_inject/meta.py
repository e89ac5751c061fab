"""The meta device, made quick, and multiply-adds counted on it.

torch finds the shapes of pointwise operators and norms on the meta device in Python, at 0.1 to 0.6 ms each, which
is most of the time of a run. Where the result is like the first argument, that need not be asked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten
_LIKE_FIRST = {
    getattr(_aten, name) for name in (
        "add", "sub", "mul", "div", "relu", "gelu", "silu", "sigmoid", "tanh", "hardtanh", "hardswish", "hardsigmoid",
        "leaky_relu", "elu", "mish", "clamp", "neg")
}  # fmt: skip
_IN_PLACE = {
    getattr(_aten, name) for name in (
        "add_", "sub_", "mul_", "div_", "relu_", "silu_", "sigmoid_", "hardtanh_", "hardswish_", "hardsigmoid_",
        "leaky_relu_", "elu_", "mish_", "clamp_", "fill_", "zero_", "normal_", "uniform_", "erfinv_")
}  # fmt: skip
_NORMS = {_aten.native_layer_norm, _aten.native_group_norm}
_BATCH_NORMS = {_aten.native_batch_norm: 5, _aten._native_batch_norm_legit: 5}  # position of `training`


class MetaOps(TorchDispatchMode):
    """Inside, operators on the meta device take short ways, and multiply-adds are counted by torch's own formulas.

    A short way is taken where all tensors have one shape, layout and dtype; torch does the rest.
    """

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        first = args[0] if args else None
        if isinstance(first, torch.Tensor) and first.is_meta and first.is_floating_point():
            if packet in _IN_PLACE and all(_no_larger(a, first) for a in args[1:]):
                return first
            if packet in _LIKE_FIRST and all(_as(a, first) for a in (*args[1:], *kwargs.values())):
                return _like(first)
            if packet in _NORMS:
                return first.new_empty(first.shape), first, first  # the statistics are for the backward alone
            if packet in _BATCH_NORMS and args[_BATCH_NORMS[packet]] is False:
                return _like(first), first, first
        if packet is _aten.addmm and not kwargs and all(a.is_meta for a in args):
            out = args[1].new_empty((args[1].shape[0], args[2].shape[1]))
        else:
            out = func(*args, **kwargs)
        formula = flop_registry.get(packet)
        if formula is not None:
            self.macs += formula(*args, **kwargs, out_val=out) // 2
        return out


def _like(t: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def _as(a: Any, first: torch.Tensor) -> bool:
    """Whether an operand leaves the result's shape, layout and dtype those of the first."""
    if not isinstance(a, torch.Tensor):
        return a is None or isinstance(a, (bool, int, float, str))
    return a.is_meta and a.shape == first.shape and a.stride() == first.stride() and a.dtype == first.dtype


def _no_larger(a: Any, first: torch.Tensor) -> bool:
    if not isinstance(a, torch.Tensor):
        return True
    return a.is_meta and (a.shape == first.shape or a.dim() == 0)
