"""Scale and sum in one pass, and in the memory of a value that nothing reads any more."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch import fx

from ..dataflow.aliasing import Memory
from ..dataflow.ops import is_tensor, layer_arguments, name_of, products, shape, writes
from .scaled_weights import scaled, takes_gate


@dataclasses.dataclass(eq=False)
class _Product:
    """A value as a full tensor times factors that are broadcast to it, times a number; `nodes` compute it, the last first."""

    full: fx.Node
    factors: list[fx.Node]
    number: float
    nodes: list[fx.Node]


def write_in_place(graph: fx.Graph, may_write: bool = True) -> tuple[int, int]:
    """Rewrite the sums and scalings of an inlined graph, in place.

    Args:
        graph: Changed in place.
        may_write: Whether the graph may write into the memory of its values. Not in a `torch.fx.GraphModule`: it has this one
            forward for all calls, also for those with gradients.

    Returns:
        How many sums, and how many products outside of sums, were rewritten.
    """
    memory = Memory(graph, may_write)
    sums = sum(_rewrite_sum(memory, node) for node in list(graph.nodes) if _is_sum(node))
    scalings = sum(_rewrite_scaling(memory, node) for node in list(graph.nodes) if _is_scaling(node))
    return sums, scalings


def _is_sum(node: fx.Node) -> bool:
    return name_of(node) == "add" and not node.kwargs and len(
        node.args) == 2 and is_tensor(node) and all(is_tensor(a) and _is_full(a, node) for a in node.args)


def _is_scaling(node: fx.Node) -> bool:
    """Whether a node is the last of the products of a value."""
    return bool(node.users) and _split(node) is not None and all(_split(u) is None for u in node.users)


def _is_full(x: Any, node: fx.Node) -> bool:
    """Whether an operand has the result's shape at any size of image: an axis of one position may be broadcast."""
    t, result = x.meta["val"], node.meta["val"]
    return bool(t.shape == result.shape and 1 not in result.shape and t.dtype == result.dtype and result.is_floating_point())


def _split(node: fx.Node) -> tuple[fx.Node, fx.Node | float] | None:
    """A product as its full operand and its factor: a number, or a tensor that is broadcast over positions."""
    if node.kwargs or not is_tensor(node):
        return None
    for full, k in products(node):
        if _is_full(full, node):
            if isinstance(k, (int, float)):
                return full, float(k)
            if isinstance(k, fx.Node) and is_tensor(k) and _is_small(k, node):
                return full, k
    return None


def _is_small(k: fx.Node, node: fx.Node) -> bool:
    """Whether a factor has one value for each channel, or for each image and channel."""
    t, result = k.meta["val"], node.meta["val"]
    sizes = (1,) * (result.dim() - t.dim()) + shape(k)
    return bool(t.dtype == result.dtype and result.dim() > 2 and sum(n > 1 for n in sizes[1:]) <= 1 and (
        t.numel() * 2 <= result.numel()))


def _product(memory: Memory, node: fx.Node) -> _Product:
    """A value as a product, as long as nothing else reads the operands and nothing changes them in between."""
    found = _Product(node, [], 1.0, [])
    while len(found.full.users) == 1 or not found.nodes:
        parts = _split(found.full)
        if parts is None:
            break
        full, k = parts
        operands = [full, k] if isinstance(k, fx.Node) else [full]
        if any(memory.is_read_after(n, found.full) for n in operands) or (writes(found.full) and memory.is_external(full)):
            break
        found.nodes.append(found.full)
        found.full = full
        if isinstance(k, fx.Node):
            found.factors.append(k)
        else:
            found.number *= k
    return found


def _rewrite_sum(memory: Memory, node: fx.Node) -> bool:
    """Compute a sum together with the scaling of an operand, and in the memory of one; whether either can be done."""
    graph, (a, b) = node.graph, node.args
    assert isinstance(a, fx.Node) and isinstance(b, fx.Node)
    # where the author's operator writes into `a`, whoever else has that memory must see it
    if writes(node) and not memory.is_free(a, node, (b,)):
        return False
    found = [(_product(memory, x), s) for x, s in ((a, b), (b, a)) if x is not s and list(x.users) == [node]]
    found = sorted((p for p in found if p[0].nodes), key=lambda p: -len(p[0].factors))
    if found:
        product, s = found[0]
        x = product.full
        into = next((t for t in (x, s) if memory.is_free(t, node, (x, s, *product.factors))), None)
        out = {} if into is None else {"out": into}
        with graph.inserting_before(node):
            if product.factors:
                k = _times(memory, node, product.factors)
                value = {} if product.number == 1.0 else {"value": product.number}
                new = graph.call_function(torch.addcmul, (s, x, k), {**value, **out})
            else:
                new = graph.call_function(torch.add, (s, x), {"alpha": product.number, **out})
        _replace(memory, node, new, into, product.nodes)
        return True
    for t, other in ((a, b), (b, a)):
        if t is not other and memory.is_free(t, node, (other,)):
            with graph.inserting_before(node):
                new = graph.call_method("add_", (t, other))
            _replace(memory, node, new, t, [])
            return True
    return False


def _rewrite_scaling(memory: Memory, node: fx.Node) -> bool:
    """Compute a chain of products as one, in the memory of the full operand where that is free, or with the weight of the layer
    that reads it; whether that can be done."""
    product = _product(memory, node)
    if not product.nodes:
        return False
    graph, x = node.graph, product.full
    free = memory.is_free(x, node, product.factors)
    layer = next(iter(node.users)) if len(node.users) == 1 else None
    if layer is not None and not (product.factors and all(takes_gate(layer, node, k) for k in product.factors)):
        layer = None
    if not free and (writes(node) or (len(product.nodes) == 1 and layer is None)):
        return False
    factors: list[fx.Node | float] = [*product.factors]
    if product.number != 1.0 or not factors:
        factors.append(product.number)
    with graph.inserting_before(node):
        k = _times(memory, node, factors)
        if layer is not None:
            _, weight, _, _ = layer_arguments(layer)
            pair = graph.call_function(scaled, (x, k, graph.get_attr(weight.target), free))
            new, scaled_weight = (graph.call_function(operator.getitem, (pair, i)) for i in (0, 1))
            layer.replace_input_with(weight, scaled_weight)
            if not weight.users:
                graph.erase_node(weight)
        else:
            new = graph.call_method("mul_", (x, k)) if free else graph.call_function(torch.mul, (x, k))
    _replace(memory, node, new, x if free else None, product.nodes[1:])
    return True


def _times(memory: Memory, at: fx.Node, factors: list[Any]) -> Any:
    """The product of small factors, at the graph's insert point, which is before `at`."""
    k, *others = factors
    for other in others:
        value = k.meta["val"] * other.meta["val"] if isinstance(other, fx.Node) else k.meta["val"]
        k = at.graph.call_function(torch.mul, (k, other))
        k.meta = {"val": value}
        memory.index[k] = memory.index[at]
        memory.add(k, [])
    return k


def _replace(memory: Memory, old: fx.Node, new: fx.Node, into: fx.Node | None, parts: list[fx.Node]) -> None:
    """Let `new`, in the memory of `into` or in its own, stand for `old`; erase `old`, and those of `parts` without readers."""
    memory.replace(old, new, into)
    for node in (old, *parts):
        if not node.users:
            node.graph.erase_node(node)
