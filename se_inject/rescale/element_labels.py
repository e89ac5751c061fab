"""Which factor each element of a value has, followed through operators that move elements.

A *label* is the number of a factor. A value has a tensor of labels of its own shape. To follow labels forward through a
reshape, a permutation, a slice, a padding or a concat, that operator itself runs on the labels; to follow them backward, it
runs on the numbers of the elements. So these operators need no rules of their own, whatever the layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from ..capture.graphs import compute
from ..dataflow.module_graph import spelled
from ..dataflow.ops import is_tensor, shape
from ..errors import Refusal
from ..undo import entered

ONE = -1.0  # the factor is 1
FREE = -2.0  # any factor will do: the element is 0, or nothing reads it
_aten = torch.ops.aten
_MOVES = {
    getattr(_aten, name) for name in (
        "view", "_unsafe_view", "_reshape_alias", "reshape", "permute", "transpose", "t", "expand", "unsqueeze", "squeeze",
        "slice", "select", "split", "split_with_sizes", "chunk", "unbind", "cat", "stack", "clone", "alias", "detach",
        "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d", "roll", "flip",
        "repeat", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "unfold", "new_empty", "empty", "copy_")
}  # fmt: skip


# tensors of labels

def label_channels(size: Sequence[int], axis: int) -> torch.Tensor:
    """The labels 0 to C - 1 along the axis of the channels, for a value of shape `size`."""
    view = [n if d == axis % len(size) else 1 for d, n in enumerate(size)]
    return torch.arange(size[axis], dtype=torch.float64).view(view).expand(tuple(size))


def filled(label: float, size: Sequence[int]) -> torch.Tensor:
    """One label for all elements."""
    return torch.full(tuple(size), label, dtype=torch.float64)


def compact(labels: torch.Tensor, keep: Iterable[int] = ()) -> torch.Tensor:
    """The labels, cut to one element along each axis on which they are expanded, except along the axes to keep."""
    for d in range(labels.dim()):
        if labels.stride(d) == 0 and d not in keep:
            labels = labels.narrow(d, 0, min(1, labels.shape[d]))
    return labels


def along(labels: torch.Tensor, axes: Iterable[int]) -> torch.Tensor | None:
    """The labels along some axes, with size 1 along all others; None where they differ along one of the others."""
    keep = {a % labels.dim() for a in axes}
    small = compact(labels, keep)
    other = [d for d in range(labels.dim()) if d not in keep and small.shape[d] > 1]
    if not other:
        return small
    most = small.amax(other, keepdim=True)
    return most if bool(((small == most) | (small == FREE)).all()) else None


def _merged(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor | None:
    """The labels that satisfy two readers of one value; None where an element would need two factors."""
    return None if ((a != b) & (a != FREE) & (b != FREE)).any() else torch.maximum(a, b)


# through operators that move elements

class _MovesOnly(TorchDispatchMode):
    """Inside, an operator that does more than move elements raises `Refusal`. Zeros of a padding get the label `FREE`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func._overloadpacket
        if packet not in _MOVES:
            raise Refusal(str(packet))
        if packet is _aten.constant_pad_nd:
            if len(args) > 2 and args[2] != 0:
                raise Refusal("a padding that is not zero")
            args = (*args[:2], FREE)
        return func(*args, **(kwargs or {}))


def moved(node: fx.Node, given: dict[fx.Node, Any]) -> Any:
    """The labels of an operator's result.

    Args:
        node: The call of the operator.
        given: Labels of its operands. An operand without labels has the factor 1.

    Raises:
        Refusal: The operator does more than move elements.
    """
    def value(n: fx.Node) -> Any:
        if n in given:
            return given[n]
        v = n.meta["val"]
        return filled(ONE, v.shape) if isinstance(v, torch.Tensor) else v

    args, kwargs = fx.map_arg((node.args, node.kwargs), value)
    try:
        with entered(_MovesOnly()):
            out = compute(node, args, kwargs)
    except Refusal:
        raise
    except MemoryError:
        raise
    except Exception as error:
        raise Refusal(str(error)) from error
    expected = node.meta["val"]
    if isinstance(expected, torch.Tensor) and (not isinstance(out, torch.Tensor) or out.shape != expected.shape):
        raise Refusal(str(node))
    return out


def labels_before(node: fx.Node, source: fx.Node, results: Iterable[tuple[fx.Node, torch.Tensor]]) -> torch.Tensor:
    """The labels of an operand, from those of the result.

    Args:
        node: The call of the operator.
        source: The operand.
        results: The values with known labels: `node` itself, or if the operator splits, the parts that are taken from it.

    Raises:
        Refusal: The operator does more than move elements, or an element of `source` would need two factors.
    """
    try:
        numbers = moved(node, {source: _numbered(source)})
        read = [(numbers if n is node else moved(n, {node: numbers}), labels) for n, labels in results]
    except Refusal:
        raise Refusal(f"it does not pass {spelled(node)}") from None
    found = _collected(shape(source), read)
    if found is None:
        raise Refusal(f"{spelled(node)} gives one value to several channels")
    return found


def spare(reader: fx.Node, node: fx.Node, labels: torch.Tensor) -> torch.Tensor | None:
    """The labels of a value, with the factor 1 for the part that `reader` takes; None where that part has other factors."""
    part = reader.meta["val"]
    if reader.op not in ("call_function", "call_method") or not is_tensor(reader) or part.numel() >= labels.numel():
        return None
    try:
        numbers = moved(reader, {node: _numbered(node)})
    except Refusal:
        return None
    own = _collected(shape(node), [(numbers, filled(ONE, numbers.shape))])
    return None if own is None else _merged(labels, own)


def _numbered(node: fx.Node) -> torch.Tensor:
    """A number for each element of a value."""
    size = shape(node)
    return torch.arange(math.prod(size), dtype=torch.float64).view(size)


def _collected(size: Sequence[int], read: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor | None:
    """The labels of a value from those of its results; None where an element would need two factors.

    Args:
        size: The value's shape.
        read: For each result, the numbers of the value's elements in it, and its labels.
    """
    out = filled(FREE, size)
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
