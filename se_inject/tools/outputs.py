"""Outputs of models as the tools compute and compare them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..capture.values import tensors


@torch.no_grad()
def run(model: nn.Module, images: torch.Tensor) -> Any:
    """The output of a model: in full float32 precision, and with the same random numbers in each call."""
    torch.manual_seed(0)
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        return model(images)


def deviation(expected: Any, found: Any) -> float:
    """The largest absolute difference between two outputs, over the largest absolute value expected; NaN with a NaN."""
    pairs = list(zip(tensors(expected), tensors(found), strict=True))
    largest = _largest([a for a, _ in pairs])
    difference = _largest([a - b for a, b in pairs])
    return difference / largest if largest else float(difference != 0)


def _largest(values: list[torch.Tensor]) -> float:
    return torch.stack([t.abs().max().double() for t in values]).max().item()
