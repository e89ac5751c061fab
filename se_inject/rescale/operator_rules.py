"""What single operators do to the factors of their operands, and which parameters are scaled in the end."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from ..capture.graphs import compute
from ..dataflow.module_graph import ModuleGraph, spelled
from ..dataflow.ops import is_tensor, layer_arguments, name_of, shape
from ..errors import Refusal
from .element_labels import ONE, MovesOnly, along, compact, merged, number, pulled


@dataclasses.dataclass(frozen=True, eq=False)
class Scaling:
    """One parameter to multiply by factors: `labels` has its shape and says which; a label below 0 is the factor 1.

    `power` is 1, or -1 where the parameter is divided.
    """

    key: str
    labels: torch.Tensor
    power: int

    def scale(self, values: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """`values`, multiplied; a new tensor of the same dtype."""
        chosen = factors.cpu().double() ** self.power
        by = torch.where(self.labels >= 0, chosen[self.labels.clamp(min=0).long()], torch.ones((), dtype=chosen.dtype))
        return (values.cpu().double() * by).to(values.device, values.dtype)


def moved(node: fx.Node, given: dict[fx.Node, Any]) -> Any:
    """What an operator makes of labels, where it only moves elements; of other tensors, the factor is 1.

    Raises:
        Refusal: It does more.
    """
    def value(n: fx.Node) -> Any:
        if n in given:
            return given[n]
        v = n.meta["val"]
        return torch.full(v.shape, ONE, dtype=torch.float64) if isinstance(v, torch.Tensor) else v

    args, kwargs = fx.map_arg((node.args, node.kwargs), value)
    try:
        with MovesOnly():
            out = compute(node, args, kwargs)
    except Refusal:
        raise
    except Exception as error:
        raise Refusal(str(error)) from error
    expected = node.meta["val"]
    if isinstance(expected, torch.Tensor) and (not isinstance(out, torch.Tensor) or out.shape != expected.shape):
        raise Refusal(str(node))
    return out


def operand(operand: fx.Node, labels: torch.Tensor) -> torch.Tensor:
    """The labels of an operand that is broadcast to those of the result."""
    own = shape(operand)
    if own == tuple(labels.shape):
        return labels
    same = [1] * (labels.dim() - len(own)) + list(own)
    found = along(labels, [d for d, n in enumerate(same) if n == labels.shape[d]])
    if found is None:
        raise Refusal(f"{spelled(operand)} is the same for several channels")
    return found.reshape(own)


def vector(labels: torch.Tensor, axis: int, node: fx.Node) -> torch.Tensor:
    found = along(labels, [axis])
    if found is None:
        raise Refusal(f"its channels are on another axis at {spelled(node)}")
    return found.flatten()


def across(labels: torch.Tensor, dims: Any, out: torch.Size | tuple[int, ...], node: fx.Node) -> torch.Tensor:
    """The labels of a value whose axes `dims` are reduced or resized, for the other side of the operator."""
    gone = [d % labels.dim() for d in ([dims] if isinstance(dims, int) else dims)]
    found = along(labels, [d for d in range(labels.dim()) if d not in gone])
    if found is None:
        raise Refusal(f"its channels are mixed by {spelled(node)}")
    if len(out) == labels.dim():
        return found.expand(tuple(out))
    return found.reshape(tuple(n for d, n in enumerate(labels.shape) if d not in gone)).expand(tuple(out))


def apart(view: ModuleGraph, node: fx.Node, labels: torch.Tensor, out: tuple[int, ...]) -> torch.Tensor:
    """The labels on the other side of a layer without bias that keeps the channels apart."""
    _, weight, bias, groups = layer_arguments(node)
    assert isinstance(weight, fx.Node)
    if bias is not None:
        raise Refusal(f"{spelled(node, view)} adds a bias")
    if name_of(node) == "linear":
        return across(labels, -1, out, node)
    if shape(weight)[:2] != (groups, 1) and bool((compact(labels) != compact(labels).amax()).any()):
        raise Refusal(f"{spelled(node, view)} mixes the channels")
    return across(labels, range(2, len(out)), out, node)


def beside(other: fx.Node, node: fx.Node, labels: torch.Tensor) -> torch.Tensor | None:
    """The labels of a value with the factor 1 for the part of it that `other` reads, where that is another part."""
    part = other.meta["val"]
    if other.op not in ("call_function", "call_method") or not is_tensor(other) or part.numel() >= labels.numel():
        return None
    try:
        numbers = moved(other, {node: number(shape(node))})
    except Refusal:
        return None
    own = pulled(shape(node), [(numbers, torch.full(numbers.shape, ONE, dtype=torch.float64))])
    return None if own is None else merged(labels, own)


def before(node: fx.Node, source: Any, parts: list[tuple[fx.Node, torch.Tensor]]) -> torch.Tensor:
    try:
        numbers = moved(node, {source: number(shape(source))})
        read = [(numbers if n is node else moved(n, {node: numbers}), own) for n, own in parts]
    except Refusal:
        raise Refusal(f"it does not pass {spelled(node)}") from None
    found = pulled(shape(source), read)
    if found is None:
        raise Refusal(f"{spelled(node)} gives one value to several channels")
    return found


def readers(view: ModuleGraph, node: fx.Node) -> list[fx.Node]:
    """The nodes that use the elements of a value, and not merely its size.

    Raises:
        Refusal: There are several, and the memory is written, so that what they read is not what the node made.
    """
    found = [u for u in node.users if u.op == "output" or view.carries_data(u)]
    if len(found) > 1 and is_tensor(node) and view.is_written_after(node):
        raise Refusal(f"its tensor is changed in place, and read by {spelled(found[-1], view)}")
    return found


def times(user: fx.Node, node: fx.Node) -> int:
    """How often an operator reads a value."""
    found: list[fx.Node] = []
    fx.map_arg((user.args, user.kwargs), found.append)
    return found.count(node)
