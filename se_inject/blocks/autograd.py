"""Squeeze, scale and shift in a training step: values and gradients of the plain expressions, in fewer passes over the map.

The plain backward of ``x * gate(x.mean(...))`` writes three maps of the size of ``x`` besides the gradient: the product
whose sum is the gradient of the gate, the expanded gradient of the mean, and the scaled gradient. Here, the gradient of
the mean stays a view of one value per channel, which autograd adds in place, and product and scaled gradient share one
buffer. If ``x`` is the output of a batch norm in train mode with trained weight and bias, it is not saved for the backward:
the norm saves its own input, and ``x`` is computed again from that, up to rounding.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.autograd import Function

from ..private import is_dual, is_legacy_batched, saved_by_batch_norm, transforms_are_active

# On smaller maps, the calls cost more than the saved passes. No other devices were measured.
MIN_NUMEL = 1 << 18
DEVICES = ("cpu",)
PART = 1 << 20  # elements of a half-precision map at a time: torch's mean copies what it reads to float32


def squeeze(x: torch.Tensor, dims: list[int]) -> torch.Tensor:
    """``x.mean(dims, keepdim=True)``."""
    if torch.jit.is_scripting():  # the script compiler does not look into the other branch
        return x.mean(dims, keepdim=True)
    else:
        y: torch.Tensor = _Squeeze.apply(x, dims) if _trains_eagerly(x) else x.mean(dims, keepdim=True)
        return y


def scale(x: torch.Tensor, gate: torch.Tensor, dims: list[int], shift: torch.Tensor | None = None) -> torch.Tensor:
    """``x * gate``, or ``x * gate + shift``; both have size 1 in `dims`, and the size of `x` in all other dimensions."""
    if torch.jit.is_scripting():
        return x * gate if shift is None else x * gate + shift
    else:
        if not _trains_eagerly(x, gate, *(() if shift is None else (shift,))):
            return _scaled(x, gate, shift)
        norm = _norm_of(x)
        y: torch.Tensor = (
            _Scale.apply(x, gate, shift, dims) if norm is None else
            _ScaleOfNorm.apply(x, gate, shift, dims, _Stand.apply(x), *norm))
        return y


def _scaled(x: torch.Tensor, gate: torch.Tensor, shift: torch.Tensor | None) -> torch.Tensor:
    """The plain expression; with a shift one pass, where the operator has values to compute and the dtypes agree."""
    if shift is None:
        return x * gate
    is_eager = (
        not torch.compiler.is_compiling() and type(x) is torch.Tensor and not x.is_meta and x.dtype is gate.dtype is shift.dtype
        and not torch.jit.is_tracing() and not transforms_are_active()
    )  # fmt: skip
    return torch.addcmul(shift, x, gate) if is_eager else x * gate + shift


def _norm_of(x: torch.Tensor) -> tuple[Any, ...] | None:
    """From what the output `x` of a batch norm is computed again; None where it is not, or has been written to since."""
    norm = None if x._version else saved_by_batch_norm(x)
    return norm if norm and all(type(t) in (torch.Tensor, torch.nn.Parameter) for t in norm) else None


def _trains_eagerly(x: Any, *others: Any) -> bool:
    """Whether the functions below apply. Compilers, exporters and traces get the plain expression and fuse it themselves."""
    return (
        not torch.compiler.is_compiling() and all(type(t) is torch.Tensor for t in (x, *others))
        and torch.is_grad_enabled() and x.requires_grad
        and x.device.type in DEVICES and x.numel() >= MIN_NUMEL and x.is_floating_point()
        and not torch.jit.is_tracing() and not transforms_are_active()
        and not any(map(is_dual, (x, *others)))
    )  # fmt: skip


class _Squeeze(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dims: list[int]) -> torch.Tensor:
        ctx.shape = x.shape
        ctx.count = math.prod(x.shape[d] for d in dims)
        if x.dtype not in (torch.bfloat16, torch.float16) or x.numel() < 2 * PART:
            return x.mean(dims, keepdim=True)
        images = max(1, PART * len(x) // x.numel())
        return torch.cat([part.mean(dims, keepdim=True) for part in x.split(images)])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return (grad / ctx.count).expand(ctx.shape), None


class _Scale(Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, gate: torch.Tensor, shift: torch.Tensor | None, dims: list[int]
    ) -> torch.Tensor:  # fmt: skip
        ctx.save_for_backward(x, gate)
        ctx.dims = dims
        return _scaled(x, gate, shift)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, gate = ctx.saved_tensors
        return *_gradients(ctx, grad, gate, grad * x), None


class _Stand(Function):
    """A tensor of the shape of `x`, in the memory of one number, whose gradient is that of `x`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.set_materialize_grads(False)  # there is a gradient only of a gradient
        return x.new_empty(()).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> torch.Tensor | None:
        return grad


class _WithGradientOf(Function):
    """`values`, whose gradient is that of `stand`."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, stand: torch.Tensor) -> torch.Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, grad


class _ScaleOfNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, gate: torch.Tensor, shift: torch.Tensor | None, dims: list[int], stand: torch.Tensor,
        norm_input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor, invstd: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        factor = weight * invstd
        ctx.save_for_backward(gate, stand, norm_input, factor, bias - mean * factor)
        ctx.dims = dims
        return _scaled(x, gate, shift)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, stand, norm_input, factor, offset = ctx.saved_tensors
        x = _normed(norm_input.detach(), factor.detach(), offset.detach())
        if torch.is_grad_enabled():  # a function of `x`, for the gradient of this gradient
            product = grad * _WithGradientOf.apply(x, stand)
        else:
            product = grad * x if _is_batched(grad) else torch.mul(grad, x, out=x)
        return *_gradients(ctx, grad, gate, product), *(None,) * 7


def _normed(x: torch.Tensor, factor: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """The output of a batch norm, by the quicker of two operators."""
    if x.dtype is factor.dtype and x.stride(1) == 1:
        channels = [-1] + [1] * (x.dim() - 2)
        return torch.addcmul(offset.view(channels), x, factor.view(channels))
    mean, var = torch.zeros_like(factor), torch.ones_like(factor)
    return torch.native_batch_norm(x, factor, offset, mean, var, False, 0.0, 0.0)[0]


def _gradients(
    ctx: Any, grad: torch.Tensor, gate: torch.Tensor, product: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """The gradients of ``x``, the gate and the shift, from ``grad * x``. The buffer of `product` is reused."""
    of_gate = product.sum(ctx.dims, keepdim=True)
    of_shift = grad.sum(ctx.dims, keepdim=True) if ctx.needs_input_grad[2] else None
    if not ctx.needs_input_grad[0]:
        return None, of_gate, of_shift
    if torch.is_grad_enabled() or _is_batched(grad):  # with gradients enabled, the product is needed again
        return grad * gate, of_gate, of_shift
    return torch.mul(grad, gate, out=product), of_gate, of_shift


def _is_batched(grad: torch.Tensor) -> bool:
    """Whether `grad` is a batch of gradients, for which operators have no ``out=``."""
    return transforms_are_active() or is_legacy_batched(grad)
