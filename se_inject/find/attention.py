"""Channel attention that a model already has, recognized by structure: one recognizer for ours, timm's and anyone's."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from bisect import bisect_left
from collections.abc import Iterator

from torch import fx, nn

from ..capture.calls import Call
from ..capture.channels import channel_axis
from ..capture.graphs import subgraph
from ..dataflow import ops
from ..dataflow.module_graph import ModuleGraph, TracedModel
from ..dataflow.ops import is_tensor, shape, unexpanded
from ..dataflow.value_flow import ValueFlow
from ..errors import Refusal


@dataclasses.dataclass(frozen=True, eq=False)
class Gate:
    """A block multiplies its input by this: the value of `node` in the forward `view`, which varies along `axis`.

    `moved` says that the input is in another layout there. `shift` is what the block adds, which varies along `axis` too.
    """

    view: ModuleGraph
    node: fx.Node
    axis: int
    moved: bool
    shift: fx.Node | None = None

    def function(self) -> nn.Module:
        """A module of the same weights that returns the gate alone. Call it outside `on_meta`."""
        graph = self.view.forward.graph
        before = itertools.takewhile(lambda n: n is not self.node, graph.nodes)  # what is behind may write in place
        return fx.GraphModule(self.view.module, subgraph(graph, [*before, self.node], self.node))


def gate_of(flow: ValueFlow, call: Call, *, shifts: bool = False) -> Gate:
    """The gate of the block that was called: one factor for each image and channel.

    Args:
        flow: The values of the recorded run.
        call: The call of the block.
        shifts: Whether the caller takes a block that adds a shift for each image and channel, too.

    Raises:
        Refusal: Its output is not its input times a gate.
    """
    other = Refusal("its output is not its input times a gate")
    inside = flow.traces.inside(call)
    inputs = [n for n in inside.nodes if n.op == "placeholder" and is_tensor(n)]
    result = inside.nodes[-1].args[0]
    if len(inputs) != 1 or not isinstance(result, fx.Node):
        raise other
    start = flow.unmoved(inside, inputs[0], computed=False)[1]
    outer, node = flow.unmoved(inside, result)
    for product, shift in _summands(node):
        view, node = flow.unmoved(outer, product)
        for x, g in ops.products(node):
            if not is_tensor(g) or flow.unmoved(view, x, computed=False)[1] is not start or (
                    flow.unmoved(view, g, computed=False)[1] is start):
                continue
            g = unexpanded(g)
            axis = _axis_of_gate(view, x, g)
            if axis is None or (shift is not None and (view is not outer or shape(shift) != shape(g))):
                raise other
            if shift is not None and not shifts:
                raise Refusal("it adds a shift to its input times a gate")
            return Gate(view, g, axis, flow.outward(view, x)[1] is not flow.outward(inside, inputs[0])[1], shift)
    raise other


def _axis_of_gate(view: ModuleGraph, x: fx.Node, g: fx.Node) -> int | None:
    """The axis along which the factor `g` of a map varies from channel to channel; None where it is none of an image.

    Raises:
        Refusal: It varies along other axes.
    """
    xs, gs = shape(x), shape(g)
    if len(gs) != len(xs) or gs[0] != xs[0]:
        return None
    wide = [d for d, n in enumerate(gs) if d > 0 and n != 1] or [view.channel_dim(x)]
    if len(wide) != 1 or gs[wide[0]] != xs[wide[0]]:
        raise Refusal("its gate differs from place to place")
    return wide[0]


def _summands(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node | None]]:
    """A value, and nothing that is added to it; for a sum, then both readings of it: a map, and a shift of the map."""
    yield node, None
    if ops.name_of(node) == "add" and len(node.args) == 2 and not node.kwargs:
        for x, k in (node.args, node.args[::-1]):
            if isinstance(x, fx.Node) and isinstance(k, fx.Node) and is_tensor(x) and is_tensor(k) and shape(x) == shape(node):
                yield x, k


def is_gate(view: ModuleGraph, node: fx.Node) -> bool:
    """Whether `node` scales (or shifts) a map by a learned gate that was pooled from that same map.

    The gate has the map's channels and one position, comes from the map, and passes a learned
    layer; a norm has no such layer, and a spatial mask has no channels.
    """
    scales = ops.name_of(node) == "mul"
    if not scales and ops.name_of(node) != "add":
        return False
    a, b = ops.argument(node, "input"), ops.argument(node, "other")
    if not (is_tensor(a) and is_tensor(b)):
        return False
    for x, g in ((a, unexpanded(b)), (b, unexpanded(a))):
        xs, gs = shape(x), shape(g)
        if len(xs) < 3 or len(xs) != len(gs) or not view.ancestors[view.index[g]] >> view.index[x] & 1:
            continue
        of_radix = len(xs) == 5 and channel_axis(x.meta["val"]) not in (1, 4)  # (N, radix, C, H, W), and no volume
        channel = 2 if of_radix else view.channel_dim(x)
        places = [d for d in range(channel if of_radix else 1, len(xs)) if d != channel]
        between = view.region(g, x)
        pooled = all(gs[d] == 1 for d in places) and (
            any(xs[d] > 1 for d in places) or (scales and _pools(view, between)))
        if pooled and gs[channel] == xs[channel] and view.learned(between):
            return True
    return False


def _pools(view: ModuleGraph, mask: int) -> bool:
    """Whether a set of nodes takes a mean over positions, which on a map of one position the shapes do not show."""
    for node in view.members(mask):
        op = ops.of(node)
        if op.reduces or op.pools in ("mean", "max") or op.name in ops.MATMULS:  # attention weights make a weighted mean
            return True
        if node.op == "call_module":
            with contextlib.suppress(Refusal):
                inside = view.traces.inside(view.call_of(node))
                if _pools(inside, (1 << len(inside.nodes)) - 1):
                    return True
    return False


def gates_of(view: ModuleGraph) -> list[fx.Node]:
    """The gates among the nodes of a forward, found once for all modules that share it."""
    return view.shared("gates", lambda: [n for n in view.nodes if is_gate(view, n)])


class Gates:
    """Where a model has channel attention: modules that gate their input, and products in a forward."""

    def __init__(self, traces: TracedModel) -> None:
        self.nodes: dict[nn.Module, list[fx.Node]] = {}
        for module in traces.calls:
            view = traces.view(module)
            if view is not None:
                found = gates_of(view)
                if found:
                    self.nodes[module] = found
        self.pure = {m: self._is_pure(traces.view(m), found) for m, found in self.nodes.items()}
        self._calls = sorted((c for module in self.nodes for c in traces.calls[module]), key=lambda c: c.begin)
        self._begins = [c.begin for c in self._calls]

    @staticmethod
    def _is_pure(view: ModuleGraph | None, found: list[fx.Node]) -> bool:
        """Whether a module does nothing but gate its only input."""
        if view is None or len(found) != 1 or view.nodes[-1].args[0] is not found[0]:
            return False
        inputs = [n for n in view.nodes if n.op == "placeholder" and is_tensor(n)]
        return len(inputs) == 1 and inputs[0] in found[0].args[:2]

    def inside(self, call: Call) -> str | None:
        """Path of the first gating module called in `call`, itself included."""
        i = bisect_left(self._begins, call.begin)
        return self._calls[i].path if i < len(self._calls) and self._begins[i] < call.end else None

    def in_region(self, view: ModuleGraph, mask: int) -> str | None:
        """Path of the first channel attention among a set of nodes."""
        for node in gates_of(view):
            if mask >> view.index[node] & 1:
                return view.path or type(view.module).__name__
        for call in view.calls(mask):
            path = self.inside(call)
            if path is not None:
                return path
        return None
