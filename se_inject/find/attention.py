"""Channel attention that a model already has, recognized by structure: one recognizer for ours, timm's and anyone's."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from bisect import bisect_left
from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from ..capture.calls import Call
from ..capture.channels import channel_axis
from ..capture.graphs import subgraph
from ..capture.meta_ops import storage
from ..dataflow import ops
from ..dataflow.module_graph import ModuleGraph, TracedModel
from ..dataflow.ops import is_tensor, shape, unexpanded
from ..dataflow.value_flow import ValueFlow
from ..errors import Refusal


@dataclasses.dataclass(frozen=True, eq=False)
class Gate:
    """A block multiplies its input by this: the value of `node` in the forward `view`, which varies along `axis`.

    `product` multiplies by it; `input` is the block's input there, `moved` says that it is in another layout there, and
    `shifted` that the block also adds something to the product; `shift` is that, where it is a value of the gate's shape in the
    same forward.
    """

    view: ModuleGraph
    node: fx.Node
    product: fx.Node
    input: fx.Node
    axis: int
    moved: bool
    shifted: bool = False
    shift: fx.Node | None = None

    def function(self) -> nn.Module:
        """A module of the same weights that returns the gate alone. Call it outside `on_meta`."""
        graph = self.view.forward.graph
        before = itertools.takewhile(lambda n: n is not self.product, graph.nodes)  # what is behind may write in place
        return fx.GraphModule(self.view.module, subgraph(graph, before, self.node))


def gate_of(flow: ValueFlow, call: Call, *, shifts: bool = False) -> Gate:
    """The gate of the block that was called: one factor for each image and channel.

    A shift that is added behind the gate is told from the map by its shape: it is the same at all positions.

    Args:
        flow: The values of the recorded run.
        call: The call of the block.
        shifts: Whether the caller takes a block that adds a shift, too.

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

    def is_input(view: ModuleGraph, node: fx.Node) -> bool:
        return flow.unmoved(view, node, computed=False)[1] is start

    end, last = flow.unmoved(inside, result)
    for view, product, x, g, added, plain in _products(flow, end, last):
        if not is_tensor(g) or not is_input(view, x) or is_input(view, g):
            continue
        if is_tensor(added) and (is_input(end, added) or not _is_shift(end, added, last)):
            continue
        if added is not None and not shifts:
            raise Refusal("it adds a shift to its input times a gate")
        if storage(x.meta["val"]) in view.writes_between(g, product):
            raise Refusal("its input is changed in place between its gate and the product")
        g = unexpanded(g)
        moved = flow.outward(view, x)[1] is not flow.outward(inside, inputs[0])[1]
        axis = _axis_of_gate(view, x, g, other)
        shift = added if plain and is_tensor(added) and view is end and shape(added) == shape(g) else None
        return Gate(view, g, product, x, axis, moved, added is not None, shift)
    raise other


def _products(
    flow: ValueFlow, view: ModuleGraph, node: fx.Node,
) -> Iterator[tuple[ModuleGraph, fx.Node, fx.Node, Any, Any, bool]]:  # fmt: skip
    """Each reading of a value as a tensor times a factor: the forward with the product, that, both, what is added, or None,
    and whether that is added as it is."""
    yield from ((view, node, x, g, None, False) for x, g in ops.products(node))
    if ops.name_of(node) == "addcmul" and ops.argument(node, "value", 1) == 1:
        shift, a, b = (ops.argument(node, name) for name in ("input", "tensor1", "tensor2"))
        yield from ((view, node, x, g, shift, True) for x, g in ((a, b), (b, a)))
    plain = ops.name_of(node) == "add" and ops.argument(node, "alpha", 1) == 1
    for product, added in ops.sums(node):
        inner, made = flow.unmoved(view, product)
        yield from ((inner, made, x, g, added, plain) for x, g in ops.products(made))


def _axis_of_gate(view: ModuleGraph, x: fx.Node, g: fx.Node, other: Refusal) -> int:
    """The axis along which `g`, by which `x` is multiplied, differs.

    Raises:
        Refusal: It is no gate (`other`), or it differs along several.
    """
    xs, gs = shape(x), shape(g)
    if len(gs) != len(xs) or gs[0] != xs[0]:
        raise other
    wide = _wide(gs) or [view.channel_dim(x)]
    if len(wide) != 1 or gs[wide[0]] != xs[wide[0]]:
        raise Refusal("its gate differs from place to place")
    return wide[0]


def _is_shift(view: ModuleGraph, added: fx.Node, total: fx.Node) -> bool:
    """Whether a term of a sum is the same at all positions."""
    dims, sizes = len(shape(total)), shape(unexpanded(added))
    return set(_wide((1,) * (dims - len(sizes)) + sizes)) <= {view.channel_dim(total)}


def _wide(sizes: tuple[int, ...]) -> list[int]:
    """The axes, past that of the images, along which a value of these sizes differs."""
    return [d for d, n in enumerate(sizes) if d > 0 and n != 1]


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
