"""Scale and sum in one pass, and in the memory of a value that is not read any more."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx

from ..dataflow.aliasing import Memory
from ..dataflow.ops import is_tensor, name_of, products, shape, writes


@dataclasses.dataclass(eq=False)
class _Product:
    """A value as a full tensor times tensors that are broadcast to it, and a number; `nodes` are the products."""

    full: fx.Node
    factors: list[fx.Node]
    number: float
    nodes: list[fx.Node]


def write_in_place(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Rewrite the sums and scalings of a flat graph, in place.

    Returns:
        For each sum and product that was there, what stands for it now.
    """
    memory = Memory(graph)
    done: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        if _is_sum(node):
            new = _sum(graph, memory, node)
            if new is not None:
                done[node] = new
    for node in list(graph.nodes):
        if node.users and _split(node) is not None and not any(_split(u) is not None for u in node.users):
            new = _scaled(graph, memory, node)
            if new is not None:
                done[node] = new
    return done


def _is_sum(node: fx.Node) -> bool:
    return name_of(node) == "add" and not node.kwargs and len(
        node.args) == 2 and is_tensor(node) and all(is_tensor(a) and _like(a, node) for a in node.args)


def _like(a: Any, node: fx.Node) -> bool:
    """Whether an operand has the result's shape at any size of image: an axis of one may be one that is broadcast."""
    x, y = a.meta["val"], node.meta["val"]
    return bool(x.shape == y.shape and 1 not in y.shape and x.dtype == y.dtype and y.is_floating_point())


def _writes(node: fx.Node) -> bool:
    """Whether it is the author's own operator in place, which also has an effect on who else has that memory."""
    return writes(node)


def _split(node: fx.Node) -> tuple[fx.Node, fx.Node | float] | None:
    """A product as its full operand and the one that is broadcast over positions, or the number."""
    if node.kwargs or not is_tensor(node):
        return None
    for full, k in products(node):
        if not _like(full, node):
            continue
        if isinstance(k, (int, float)):
            return full, float(k)  # type: ignore[return-value]
        if is_tensor(k) and k.meta["val"].dtype == node.meta["val"].dtype and _is_small(k, node):  # type: ignore[union-attr]
            return full, k  # type: ignore[return-value]
    return None


def _is_small(k: Any, node: fx.Node) -> bool:
    """Whether a factor has one channel axis, and maybe the batch."""
    sizes, whole = shape(k), shape(node)
    sizes = (1,) * (len(whole) - len(sizes)) + sizes
    return len(whole) > 2 and sum(n > 1 for n in sizes[1:]) <= 1 and k.meta["val"].numel() * 2 <= node.meta["val"].numel()


def _product(memory: Memory, node: fx.Node) -> _Product:
    """A value as a product, as far as nothing else reads the parts and nothing changes them in between."""
    found = _Product(node, [], 1.0, [])
    while len(found.full.users) == 1 or not found.nodes:
        parts = _split(found.full)
        if parts is None:
            break
        full, k = parts
        operands = [full, *([k] if isinstance(k, fx.Node) else [])]
        if any(memory.is_read_after(n, found.full) for n in operands) or (_writes(found.full) and memory.is_external(full)):
            break
        found.nodes.append(found.full)
        found.full = full
        if isinstance(k, fx.Node):
            found.factors.append(k)
        else:
            found.number *= k
    return found


def _sum(graph: fx.Graph, memory: Memory, node: fx.Node) -> fx.Node | None:
    a, b = node.args
    assert isinstance(a, fx.Node) and isinstance(b, fx.Node)
    if _writes(node) and not memory.is_free(a, node, (b,)):
        return None
    products = [(_product(memory, x), s) for x, s in ((a, b), (b, a)) if x is not s and list(x.users) == [node]]
    products = sorted((p for p in products if p[0].nodes), key=lambda p: -len(p[0].factors))
    if products:
        product, s = products[0]
        x = product.full
        into = next((t for t in (x, s) if memory.is_free(t, node, (x, s, *product.factors))), None)
        out = {} if into is None else {"out": into}
        with graph.inserting_before(node):
            if product.factors:
                k = _times(graph, memory, node, product.factors)
                value = {} if product.number == 1.0 else {"value": product.number}
                new = graph.call_function(torch.addcmul, (s, x, k), {**value, **out})
            else:
                new = graph.call_function(torch.add, (s, x), {"alpha": product.number, **out})
        memory.replace(node, new, into)
        graph.erase_node(node)
        for n in product.nodes:
            if not n.users:
                graph.erase_node(n)
        return new
    for t, other in ((a, b), (b, a)):
        if t is not other and memory.is_free(t, node, (other,)):
            with graph.inserting_before(node):
                new = graph.call_method("add_", (t, other))
            memory.replace(node, new, t)
            graph.erase_node(node)
            return new
    return None


def _times(graph: fx.Graph, memory: Memory, at: fx.Node, factors: list[fx.Node]) -> fx.Node:
    """The product of the small factors."""
    k = factors[0]
    for other in factors[1:]:
        value = k.meta["val"] * other.meta["val"]
        k = graph.call_function(torch.mul, (k, other))
        k.meta = {"val": value}
        memory.index[k] = memory.index[at]
        memory.add(k, [])
    return k


def _scaled(graph: fx.Graph, memory: Memory, node: fx.Node) -> fx.Node | None:
    product = _product(memory, node)
    if not product.nodes:
        return None
    x = product.full
    free = memory.is_free(x, node, product.factors)
    if not free and (len(product.nodes) == 1 or _writes(node)):
        return None
    with graph.inserting_before(node):
        k: Any = _times(graph, memory, node, product.factors) if product.factors else product.number
        if product.factors and product.number != 1.0:
            value = k.meta["val"]
            k = graph.call_function(torch.mul, (k, product.number))
            k.meta = {"val": value}
            memory.index[k] = memory.index[node]
            memory.add(k, [])
        new = graph.call_method("mul_", (x, k)) if free else graph.call_function(torch.mul, (x, k))
    memory.replace(node, new, x if free else None)
    graph.erase_node(node)
    for n in product.nodes:
        if n is not node and not n.users:
            graph.erase_node(n)
    return new
