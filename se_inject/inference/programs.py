"""What the forwards of an optimized copy ask at run time: how they are called."""

from __future__ import annotations

import torch
from torch import fx

from ..private import is_dual, transforms_are_active


def is_program(x: torch.Tensor) -> bool:
    """Whether a forward on `x` is compiled, traced or exported: it is then for other sizes and values, too."""
    return isinstance(x, fx.Proxy) or torch.compiler.is_compiling() or torch.jit.is_tracing()


def wants_plain(x: torch.Tensor) -> bool:
    """Whether the author's code must run.

    It must with gradients and in transforms, for which operators in place have no rules; under autocast, where values that
    share memory may differ in dtype; and in traces of fx and torch.jit, whose programs may take no ``out=`` and other dtypes
    (ONNX, quantization).
    """
    if torch.jit.is_scripting():  # TorchScript does not compile the other branch
        return False
    else:
        return isinstance(x, fx.Proxy) or torch.jit.is_tracing() or (x.requires_grad and torch.is_grad_enabled()) or (
            not x.is_meta and torch.is_autocast_enabled(x.device.type)) or (
            not torch.compiler.is_compiling() and (transforms_are_active() or is_dual(x)))

