"""What the class and the weights of a single module tell: a layer of torch's, learned work, a convolution over space."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..private import ConvNd

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@functools.lru_cache(maxsize=4096)
def is_layer(cls: Any) -> bool:
    """Whether a class is one of torch's layers or derived from one: it has no owner's forward, whatever its children."""
    return not issubclass(cls, _CONTAINERS) and any(
        base is not nn.Module and base.__module__.startswith("torch.nn.") for base in cls.__mro__)


def is_weight(tensor: torch.Tensor) -> bool:
    """Whether a parameter mixes channels or positions; a norm's or a layer scale's does not."""
    return tensor.numel() > max(tensor.shape, default=1)


def mixes(module: nn.Module) -> bool:
    """Whether a module has weights of its own that mix channels or positions; ECA's convolution has only a few."""
    if isinstance(module, (ConvNd, nn.Linear)):
        return True
    return any(is_weight(p) for p in module._parameters.values() if p is not None)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm: one of torch's or derived from it, or a layer that is called so and mixes nothing."""
    named = [c for c in type(module).__mro__ if "norm" in c.__name__.lower()]
    if any(c.__module__.startswith("torch.nn.") for c in named):
        return True
    inner = any(True for child in module.children() for _ in child.parameters())
    return bool(named) and not inner and not mixes(module)


def is_conv(module: nn.Module) -> bool:
    """Whether `module` is a convolution over space, by itself: kernel larger than one. ECA's is one over channels."""
    kernel = getattr(module, "kernel_size", None)
    weight = module._parameters.get("weight")
    mixing = weight is not None and weight.dim() >= 3 and math.prod(weight.shape[:2]) > 1
    return mixing and kernel is not None and max(_ints(kernel), default=1) > 1


def is_depthwise(module: nn.Module) -> bool:
    return is_conv(module) and getattr(module, "groups", 1) == getattr(module, "in_channels", 0) > 1


def _ints(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, Sequence) else (value,)
