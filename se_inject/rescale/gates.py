"""Which weights take in a block's gate, and what the gate is; used by `fold` and `to_native`."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx, nn

from ..capture.forward import trace_forward
from ..capture.graphs import copy_graph
from ..capture.recording import Call
from ..capture.snapshot import restored
from ..dataflow.module_graph import ModuleGraph
from ..dataflow.ops import LAYOUTS, MULS, is_tensor, shape
from ..errors import TraceError
from ..surgery.state import OwnerEdits
from .absorb import Absorber
from .element_labels import spread
from .operator_rules import Scaling, Unabsorbed


@dataclasses.dataclass(frozen=True, eq=False)
class Gate:
    """Where a block multiplies its input by its gate: in the forward of `module`, by the value of `node`."""

    module: nn.Module
    graph: fx.Graph
    node: fx.Node

    def function(self) -> nn.Module:
        """A module of the same weights that returns the gate alone. Make it outside `abstract`."""
        graph = copy_graph(self.graph)
        nodes = dict(zip(self.graph.nodes, graph.nodes))
        gate = nodes[self.node]
        needed: set[fx.Node] = set()
        ways = [gate]
        while ways:
            node = ways.pop()
            if node not in needed:
                needed.add(node)
                ways += node.all_input_nodes
        index = {n: i for i, n in enumerate(graph.nodes)}
        output = list(graph.nodes)[-1]
        output.args = (gate,)
        for n in reversed(list(graph.nodes)):
            if index[n] > index[gate] and n is not output and n not in needed:
                graph.erase_node(n)  # the product, which may be in place
        return fx.GraphModule(self.module, graph)


def gate_of(absorber: Absorber, call: Call, layout: str) -> Gate:
    """The gate of the block that was called on a tensor of this layout.

    Raises:
        Unabsorbed: Its output is not its input times one gate for each channel.
    """
    view = absorber.view(call)
    other = Unabsorbed("its output is not its input times a gate")
    node = _laid_out(view.nodes[-1].args[0])
    if node is None:
        raise other
    if node.op == "call_module" and len(node.args) == 1 and _is_input(node.args[0]):
        inner = view.call_of(node)
        return gate_of(absorber, inner, layout if node.args[0].op == "placeholder" else "NCHW")  # type: ignore[union-attr]
    if node.target not in MULS or len(node.args) < 2:
        raise other
    operands: tuple[Any, ...] = tuple(node.args[:2])
    for x, g in (operands, operands[::-1]):
        if isinstance(x, fx.Node) and x.op == "placeholder" and is_tensor(g) and not _is_input(g):
            while g.op == "call_method" and g.target in ("expand", "expand_as") and is_tensor(g.args[0]):
                g = g.args[0]
            xs, gs = shape(x), shape(g)
            dim = 1 if layout == "NCHW" else len(xs) - 1
            if len(gs) != len(xs) or gs[dim] != xs[dim] or gs[0] != xs[0]:
                raise other
            if any(gs[d] != 1 for d in range(1, len(gs)) if d != dim):
                raise Unabsorbed("its gate differs from place to place")
            return Gate(call.module, view.forward.graph, g)
    raise other


def _laid_out(node: object) -> fx.Node | None:
    """What a value is, in another layout."""
    while isinstance(node, fx.Node) and node.target in LAYOUTS:
        node = node.args[0]
    return node if isinstance(node, fx.Node) else None


def _is_input(node: object) -> bool:
    found = _laid_out(node)
    return found is not None and found.op == "placeholder"


@dataclasses.dataclass(frozen=True, eq=False)
class Around:
    """The call of a block in its owner's forward, and the axis of its channels."""

    view: ModuleGraph
    node: fx.Node
    channels: int
    axis: int


def around(absorber: Absorber, block: nn.Module, layout: str) -> Around:
    """Where a block is called.

    Raises:
        Unabsorbed: It is called more than once, or its owner cannot be traced.
    """
    calls = absorber.traces.calls.get(block, ())
    if len(calls) != 1:
        raise Unabsorbed("it is called more than once" if calls else "it is not called")
    view, node = absorber.caller(absorber.view(calls[0]))
    dims = shape(node)
    axis = 1 if layout == "NCHW" else len(dims) - 1
    return Around(view, node, dims[axis], axis)


def absorb_gate(absorber: Absorber, at: Around) -> list[Scaling]:
    """The scalings that do what a constant gate does, by the number of the channel: before the block, else behind it.

    Raises:
        Unabsorbed: There are none; the reasons of both.
    """
    labels = spread(at.channels, at.axis, shape(at.node))
    try:
        return absorber.up(at.view, at.node.args[0], labels, at.node)
    except Unabsorbed as error:
        before = str(error)
    try:
        return absorber.down(at.view, at.node, labels)
    except Unabsorbed as error:
        raise Unabsorbed(f"before it: {before}; behind it: {error}") from None


def outer_gain(view: ModuleGraph, edits: OwnerEdits, slot: str) -> float:
    """The factor that the author's forward puts behind a slot only when it is filled (NFNet's 2).

    Raises:
        Unabsorbed: Without the block the forward does something else.
    """
    if edits.way != "fill" or edits.original is not None:
        return 1.0
    module = view.module
    decisions = iter(view.forward.decisions)
    with restored([module]):
        module.__dict__["_modules"] = {k: m for k, m in module._modules.items() if k != slot}
        if edits.original_registered:
            module._modules[slot] = None
        else:
            module.__dict__[slot] = None
        try:
            empty = trace_forward(module, view.forward.constants, lambda _: next(decisions))
        except (TraceError, StopIteration) as error:
            raise Unabsorbed(f"without it, its owner cannot be traced: {error}") from None
    extra = len(view.nodes) - len(empty.nodes) - 1
    if extra == 0:
        return 1.0
    (call,) = [n for n in view.nodes if n.op == "call_module" and n.target == slot]
    factors = [a for u in call.users if u.target in MULS for a in u.args if isinstance(a, (int, float))]
    if extra == 1 and len(call.users) == 1 and len(factors) == 1:
        return float(factors[0])
    raise Unabsorbed("without it, the forward of its owner does something else")


def absorb_gain(absorber: Absorber, module: nn.Module, gain: float) -> list[Scaling]:
    """The scalings that do what the factor in `module`, one of `gains`, does.

    Raises:
        Unabsorbed: There are none.
    """
    view = absorber.view(absorber.traces.calls[module][0])
    (node,) = [n for n in view.nodes if n.target in MULS and any(
        isinstance(a, float) and a == gain for a in n.args)]
    return absorber.down(view, node, torch.zeros((), dtype=torch.float64).expand(shape(node)))
