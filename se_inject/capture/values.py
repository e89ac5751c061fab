"""What a model returns: a tensor, or nested lists, tuples and dicts of tensors; flattened, and compared bit by bit."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_leaves


def tensors(value: Any) -> list[torch.Tensor]:
    """The tensors in a value, in their order."""
    return [t for t in tree_leaves(value) if isinstance(t, torch.Tensor)]


def equal(a: Any, b: Any) -> bool:
    """Whether two values have the same structure and equal leaves."""
    (leaves, structure), (other_leaves, other_structure) = tree_flatten(a), tree_flatten(b)
    return structure == other_structure and all(map(_equal_leaves, leaves, other_leaves))


def _equal_leaves(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)
