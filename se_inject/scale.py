"""The squeeze and the scale of a block in training: the same values and gradients as the plain expressions, in fewer passes.

The plain backward of ``x * gate(x.mean(...))`` writes three maps of the size of ``x`` beside the gradient itself: the
product whose sum is the gate's gradient, the mean's gradient spread out, and the scaled gradient. Here the mean's
gradient stays a view of one value per channel, which autograd adds in place, and product and scaled gradient share
one buffer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import Function, forward_ad

# On smaller maps the calls cost as much as the passes that they save. Other devices were not measured.
MIN_NUMEL = 1 << 18
DEVICES = ("cpu",)


def squeeze(x: torch.Tensor, dims: list[int]) -> torch.Tensor:
    """``x.mean(dims, keepdim=True)``."""
    if torch.jit.is_scripting():  # what is behind it is not compiled
        return x.mean(dims, keepdim=True)
    else:
        y: torch.Tensor = _Squeeze.apply(x, dims) if _trains_eagerly(x, x) else x.mean(dims, keepdim=True)
        return y


def scale(x: torch.Tensor, gate: torch.Tensor, dims: list[int]) -> torch.Tensor:
    """``x * gate``, where `gate` has size 1 in `dims` and is as `x` elsewhere."""
    if torch.jit.is_scripting():
        return x * gate
    else:
        y: torch.Tensor = _Scale.apply(x, gate, dims) if _trains_eagerly(x, gate) else x * gate
        return y


def _trains_eagerly(x: Any, gate: Any) -> bool:
    """Whether the functions below serve: compilers, exporters and traces get the plain expression, and fuse it themselves."""
    return (
        not torch.compiler.is_compiling() and type(x) is torch.Tensor and type(gate) is torch.Tensor
        and torch.is_grad_enabled() and x.requires_grad
        and x.device.type in DEVICES and x.numel() >= MIN_NUMEL and x.is_floating_point()
        and not torch.jit.is_tracing() and not _transformed()
        and forward_ad.unpack_dual(x).tangent is None and forward_ad.unpack_dual(gate).tangent is None
    )  # fmt: skip


def _transformed() -> bool:
    """Whether vmap, jvp or another of `torch.func` is at work."""
    return bool(torch._C._are_functorch_transforms_active())


class _Squeeze(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dims: list[int]) -> torch.Tensor:
        mean = x.mean(dims, keepdim=True)
        ctx.shape = x.shape
        ctx.count = x.numel() // mean.numel()
        return mean

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return (grad / ctx.count).expand(ctx.shape), None


class _Scale(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gate: torch.Tensor, dims: list[int]) -> torch.Tensor:
        ctx.save_for_backward(x, gate)
        ctx.dims = dims
        return x * gate

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, None]:
        x, gate = ctx.saved_tensors
        product = grad * x
        of_gate = product.sum(ctx.dims, keepdim=True)
        if not ctx.needs_input_grad[0]:
            return None, of_gate, None
        batched = _transformed() or torch._C._functorch.is_legacy_batchedtensor(grad)  # of gradients: no out= there
        if torch.is_grad_enabled() or batched:  # in the first, the product is needed again
            return grad * gate, of_gate, None
        return torch.mul(grad, gate, out=product), of_gate, None
