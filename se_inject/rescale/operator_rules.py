"""How a factor passes a single operator: what to scale before the operator, or in and behind it.

The rules of an operator are choices; one is enough. A factor on the result of a convolution, for example, goes into the rows
of its weight and its bias, or on to its input, if the convolution keeps the channels apart. A choice is a function: it is
called when the choice is tried, returns the goals, and raises `Refusal` if the choice does not apply.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import fx

from ..dataflow.module_graph import ModuleGraph, spelled
from ..dataflow.ops import CONVS, argument, is_tensor, layer_arguments, name_of, of, shape
from ..errors import Refusal
from .element_labels import ONE, along, compact, filled, labels_before, moved


class Goal(NamedTuple):
    """What has to be scaled next: the value of `node`, as `reader` reads it.

    Without a reader, the value itself stays, and what is computed from it has to be scaled instead. `labels` are those of
    the value's elements; they may then be a list, for the parts of a split.
    """

    node: Any
    labels: Any
    reader: fx.Node | None = None


Choice = Callable[[], Iterable[Goal]]  # all of its goals have to be reached


def choices_before(view: ModuleGraph, node: fx.Node, labels: torch.Tensor) -> list[Choice]:
    """What to scale before an operator, so that its result is scaled.

    Raises:
        Refusal: The operator does not pass a factor.
    """
    op, first = of(node), argument(node, "input")
    if op.name == "add":
        return [partial(_terms, node, [first, argument(node, "other")], labels)]
    if op.name in ("mul", "addcmul"):
        term = first if op.name == "addcmul" else None
        factors = [a for a in (node.args[:2] if term is None else node.args[1:3]) if isinstance(a, fx.Node) and is_tensor(a)]
        factors.sort(key=view.moves)  # a parameter before an activation
        return [partial(_factor_and_term, node, f, term, labels) for f in factors]
    if op.name == "div":
        if node.kwargs or not is_tensor(first):
            raise Refusal(f"it does not pass {spelled(node)}")
        return [partial(_operand, node, first, labels)]
    if op.scales:
        return [lambda: [Goal(first, labels, node)]]
    dims = _combined_axes(node)
    if dims is not None:
        if op.reduces and len(shape(node)) != len(shape(first)):
            for d in sorted(d % len(shape(first)) for d in _axes(dims)):
                labels = labels.unsqueeze(d)
        return [lambda: [Goal(first, _across(labels, dims, shape(first), node), node)]]
    if op.normalizes:
        return [partial(_affine, view, node, labels)]
    if op.name == "linear" or op.name in CONVS:
        return [partial(_rows, view, node, labels),
                lambda: [Goal(first, _apart(view, node, labels, shape(first)), node)]]
    return [partial(_moved_before, view, node, labels)]


def choices_behind(view: ModuleGraph, user: fx.Node, node: fx.Node, labels: Any, prefer_factor: bool) -> list[Choice]:
    """What to scale in or behind an operator, instead of its operand.

    Args:
        view: The forward that calls the operator.
        user: The call of the operator.
        node: The operand.
        labels: The operand's.
        prefer_factor: Whether a product may scale its other factor even if that is an activation.

    Raises:
        Refusal: The operator does not pass a factor.
    """
    op, once = of(user), reads(user, node) == 1
    is_first = once and argument(user, "input") is node
    if op.name == "mul" and once:
        return _product(view, user, node, labels, prefer_factor)
    if op.name == "add":
        if user.kwargs or 0 not in [a for a in user.args if not isinstance(a, fx.Node)]:
            raise Refusal(f"it is added to something else at {spelled(user, view)}")
        return [lambda: [Goal(user, labels)]]
    if op.name == "div" and is_first and not user.kwargs:
        return [lambda: [Goal(user, labels.expand(shape(user)))]]
    if op.scales and op.name != "div" and is_first:
        return [lambda: [Goal(user, labels)]]
    dims = _combined_axes(user)
    if dims is not None and is_first:
        return [lambda: [Goal(user, _across(labels, dims, shape(user), user))]]
    if (op.name == "linear" or op.name in CONVS) and is_first:
        return [partial(_columns, view, user, labels),
                lambda: [Goal(user, _apart(view, user, labels, shape(user)))]]
    try:
        result = moved(user, {node: labels})
    except Refusal:
        raise Refusal(f"it does not pass {spelled(user, view)}") from None
    return [lambda: [Goal(user, result)]]


def reads(user: fx.Node, node: fx.Node) -> int:
    """How often a call reads a value."""
    found: list[fx.Node] = []
    fx.map_arg((user.args, user.kwargs), found.append)
    return found.count(node)


# sums and products

def _operand(node: fx.Node, operand: fx.Node, labels: torch.Tensor) -> Iterator[Goal]:
    """An operand that may be broadcast to the result."""
    own = shape(operand)
    if own != tuple(labels.shape):
        padded = [1] * (labels.dim() - len(own)) + list(own)
        found = along(labels, [d for d, n in enumerate(padded) if n == labels.shape[d]])
        if found is None:
            raise Refusal(f"{spelled(operand)} is the same for several channels")
        labels = found.reshape(own)
    yield Goal(operand, labels, node)


def _terms(node: fx.Node, terms: Iterable[Any], labels: torch.Tensor) -> Iterator[Goal]:
    terms = [t for t in terms if is_tensor(t) or t != 0]  # Python's sum begins with 0
    if node.kwargs or not all(map(is_tensor, terms)):
        raise Refusal(f"a constant is added at {spelled(node)}")
    for t in terms:
        yield from _operand(node, t, labels)


def _factor_and_term(node: fx.Node, factor: fx.Node, term: Any, labels: torch.Tensor) -> Iterator[Goal]:
    """One factor of a product, and what is added to the product."""
    yield from _operand(node, factor, labels)
    if term is not None:
        yield from _terms(node, [term], labels)


def _product(view: ModuleGraph, user: fx.Node, node: fx.Node, labels: torch.Tensor, prefer_factor: bool) -> list[Choice]:
    """The other factor if it is a parameter, such as a layer scale; otherwise the product."""
    result = labels.expand(shape(user))
    others = [a for a in user.args[:2] if isinstance(a, fx.Node) and is_tensor(a) and a is not node]
    choices: list[Choice] = [lambda: [Goal(user, result)]]
    if others and (prefer_factor or not view.moves(others[0])):
        choices.insert(0, partial(_operand, user, others[0], result))
    return choices


# layers

def _affine(view: ModuleGraph, node: fx.Node, labels: torch.Tensor) -> Iterator[Goal]:
    """Weight and bias of a norm."""
    weight, bias = argument(node, "weight"), argument(node, "bias")
    if weight is None:
        raise Refusal(f"{spelled(node, view)} has no weight")
    own = labels if name_of(node) in ("layer_norm", "rms_norm") else labels.movedim(1, -1)
    for p in (weight, bias):
        if p is not None:
            yield from _operand(node, p, own)


def _rows(view: ModuleGraph, node: fx.Node, labels: torch.Tensor) -> Iterator[Goal]:
    """The rows of a layer's weight, and its bias."""
    weight, bias = _weight(view, node), argument(node, "bias")
    channels = _channels(labels, node)
    yield Goal(weight, channels.view(-1, *[1] * (len(shape(weight)) - 1)).expand(shape(weight)), node)
    if bias is not None:
        yield Goal(bias, channels, node)


def _columns(view: ModuleGraph, node: fx.Node, labels: torch.Tensor) -> Iterator[Goal]:
    """The columns of a layer's weight, which multiply the channels of its input."""
    weight, groups = _weight(view, node), layer_arguments(node)[3]
    rows, inputs, *kernel = shape(weight)
    columns = _channels(labels, node).view(groups, 1, inputs).expand(groups, rows // groups, inputs)
    yield Goal(weight, columns.reshape(rows, inputs, *[1] * len(kernel)).expand(shape(weight)), node)


def _weight(view: ModuleGraph, node: fx.Node) -> fx.Node:
    weight = argument(node, "weight")
    if not is_tensor(weight):
        raise Refusal(f"{spelled(node, view)} has no weight")
    assert isinstance(weight, fx.Node)
    return weight


def _channels(labels: torch.Tensor, node: fx.Node) -> torch.Tensor:
    """The labels along the channels of a layer's input or result."""
    found = along(labels, [-1 if name_of(node) == "linear" else -1 - _spatial(node)])
    if found is None:
        raise Refusal(f"its channels are on another axis at {spelled(node)}")
    return found.flatten()


def _apart(view: ModuleGraph, node: fx.Node, labels: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """The labels on the other side, of shape `size`, of a layer without bias that keeps the channels apart.

    A layer that mixes the channels passes one factor for all of them.
    """
    weight, groups = _weight(view, node), layer_arguments(node)[3]
    if argument(node, "bias") is not None:
        raise Refusal(f"{spelled(node, view)} adds a bias")
    if name_of(node) == "linear":
        return _across(labels, -1, size, node)
    if shape(weight)[:2] == (groups, 1):
        return _across(labels, range(-_spatial(node), 0), size, node)
    most = compact(labels).amax()
    if bool((compact(labels) != most).any()):
        raise Refusal(f"{spelled(node, view)} mixes the channels")
    return most.expand(size)


# operators that combine or move elements

def _combined_axes(node: fx.Node) -> Any:
    """The axes over which a pool or a reduction combines elements; None for other operators.

    A factor that is the same along these axes passes the operator.
    """
    op = of(node)
    if op.pools:
        return range(-_spatial(node), 0)
    return fx.map_arg(argument(node, "dim"), lambda n: n.meta["val"]) if op.reduces else None


def _spatial(node: fx.Node) -> int:
    """The number of spatial axes, the last ones, of a pool or a convolution: on a value without a batch axis, too."""
    name = name_of(node)
    return int(name[-2]) if name.endswith("d") else len(shape(node)) - 2


def _axes(dims: Any) -> Iterable[int]:
    return [dims] if isinstance(dims, int) else dims


def _across(labels: torch.Tensor, dims: Any, size: tuple[int, ...], node: fx.Node) -> torch.Tensor:
    """The labels on the other side, of shape `size`, of an operator that reduces or resizes the axes `dims`."""
    gone = [d % labels.dim() for d in _axes(dims)]
    found = along(labels, [d for d in range(labels.dim()) if d not in gone])
    if found is None:
        raise Refusal(f"its channels are mixed by {spelled(node)}")
    if len(size) == labels.dim():
        return found.expand(size)
    return found.reshape(tuple(n for d, n in enumerate(labels.shape) if d not in gone)).expand(size)


def _moved_before(view: ModuleGraph, node: fx.Node, labels: torch.Tensor) -> Iterator[Goal]:
    """All values that an operator reads whose elements it moves."""
    for source in node.all_input_nodes:
        if is_tensor(source):
            yield Goal(source, labels_before(node, source, [(node, labels)]), node)
        elif view.carries_data(source):  # the result of a split, and `node` is one of its parts
            whole = source.args[0] if source.args else None
            if len(source.all_input_nodes) != 1 or not is_tensor(whole) or not all(map(is_tensor, source.users)):
                raise Refusal(f"it comes out of {spelled(source, view)} together with others")
            parts = [(n, labels if n is node else filled(ONE, shape(n))) for n in source.users]
            yield Goal(whole, labels_before(source, whole, parts), source)  # type: ignore[arg-type]
