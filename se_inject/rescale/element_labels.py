"""Which factor applies to each element of a value: followed through operators that only move elements.

A value of a traced forward gets a tensor of labels of its own shape. To follow one through a reshape, a permutation,
a slice, a padding or a concat, that very operator is run on the labels; to go back, on the numbers of the elements.
So no operator needs a rule of its own, in whatever layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import Refusal

ONE, FREE = -1.0, -2.0  # the factor is 1; any factor is right, as the element is zero or not used
_aten = torch.ops.aten
_MOVES = {
    getattr(_aten, name) for name in (
        "view", "_unsafe_view", "_reshape_alias", "reshape", "permute", "transpose", "t", "expand", "unsqueeze", "squeeze",
        "slice", "select", "split", "split_with_sizes", "chunk", "unbind", "cat", "stack", "clone", "alias", "detach",
        "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d", "roll", "flip",
        "repeat", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "unfold", "new_empty", "empty", "copy_")
}  # fmt: skip


class MovesOnly(TorchDispatchMode):
    """Inside, operators that do not merely move elements raise `Refusal`. Zeros that are padded on are labelled `FREE`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func._overloadpacket
        if packet not in _MOVES:
            raise Refusal(str(packet))
        if packet is _aten.constant_pad_nd:
            if len(args) > 2 and args[2] != 0:
                raise Refusal("a padding that is not zero")
            args = (*args[:2], FREE)
        return func(*args, **(kwargs or {}))


def number(shape: Sequence[int]) -> torch.Tensor:
    """A number for each element."""
    count = 1
    for n in shape:
        count *= n
    return torch.arange(count, dtype=torch.float64).view(*shape)


def pulled(shape: Sequence[int], read: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor | None:
    """The labels of a value, from the labels of what was made of it; None where one element would need two factors.

    Args:
        shape: The value's.
        read: For each value that was made of it, the numbers of its elements and the labels.
    """
    out = torch.full(tuple(shape), FREE, dtype=torch.float64)
    flat = out.view(-1)
    for numbers, labels in read:
        chosen = (numbers >= 0) & (labels != FREE)
        at, wanted = numbers[chosen].long(), labels[chosen]
        there = flat[at]
        if ((there != FREE) & (there != wanted)).any():
            return None
        flat[at] = wanted
        if (flat[at] != wanted).any():
            return None
    return out


def along(labels: torch.Tensor, axes: Iterable[int]) -> torch.Tensor | None:
    """The labels with all other axes reduced to one, where they are alike along those; else None."""
    keep = {a % labels.dim() for a in axes}
    small = compact(labels, keep)
    other = [d for d in range(labels.dim()) if d not in keep and small.shape[d] > 1]
    if not other:
        return small
    most = small.amax(other, keepdim=True)
    return most if bool(((small == most) | (small == FREE)).all()) else None


def compact(labels: torch.Tensor, keep: Iterable[int] = ()) -> torch.Tensor:
    """The labels with one element along the axes on which all are the same memory, but for those to keep."""
    for d in range(labels.dim()):
        if labels.stride(d) == 0 and d not in keep:
            labels = labels.narrow(d, 0, min(1, labels.shape[d]))
    return labels


def spread(channels: int, axis: int, shape: Sequence[int]) -> torch.Tensor:
    """Labels 0 to C - 1 along one axis."""
    view = [channels if d == axis % len(shape) else 1 for d in range(len(shape))]
    return torch.arange(channels, dtype=torch.float64).view(view).expand(tuple(shape))


def merged(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor | None:
    """The labels that serve two readers of one value, or None."""
    return None if ((a != b) & (a != FREE) & (b != FREE)).any() else torch.maximum(a, b)
