"""Outputs of two models, compared: equal bit by bit, or up to a deviation."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves


@torch.no_grad()
def run(model: nn.Module, images: torch.Tensor) -> Any:
    """The output of a model: in full float32 precision, and with the same random numbers in each call."""
    torch.manual_seed(0)
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        return model(images)


def tensors(output: Any) -> list[torch.Tensor]:
    """The tensors in an output, which may be nested lists, tuples and dicts."""
    return [t for t in tree_leaves(output) if isinstance(t, torch.Tensor)]


def equal(a: Any, b: Any) -> bool:
    """Whether two outputs have the same structure and equal values."""
    (leaves, structure), (other_leaves, other_structure) = tree_flatten(a), tree_flatten(b)
    return structure == other_structure and all(map(_equal_leaves, leaves, other_leaves))


def _equal_leaves(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


def deviation(expected: Any, found: Any) -> float:
    """The largest absolute difference between two outputs, over the largest absolute value expected; NaN with a NaN."""
    pairs = list(zip(tensors(expected), tensors(found), strict=True))
    largest = _largest([a for a, _ in pairs])
    difference = _largest([a - b for a, b in pairs])
    return difference / largest if largest else float(difference != 0)


def _largest(values: list[torch.Tensor]) -> float:
    return torch.stack([t.abs().max().double() for t in values]).max().item()
