"""Channel attention that a model already has, recognised by structure."""

from __future__ import annotations

from bisect import bisect_left

from torch import fx, nn

from ..capture.recording import Call
from ..dataflow.module_graph import ModuleGraph, TracedModel
from ..dataflow.ops import ADDS, MULS, POOLINGS, is_tensor, shape, unexpanded

_POOLING_LAYERS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d)


def is_gate(view: ModuleGraph, node: fx.Node) -> bool:
    """Whether `node` scales (or shifts) a map by a learned gate that was pooled from that same map.

    The gate has the map's channels and one position, comes from the map, and passed a learned
    layer on its way; a norm has no such layer, and a spatial mask has no channels.
    """
    if node.target not in MULS | ADDS or len(node.args) < 2 or not all(is_tensor(a) for a in node.args[:2]):
        return False
    for x, g in (node.args[:2], node.args[1::-1]):
        assert isinstance(x, fx.Node) and isinstance(g, fx.Node)
        g = unexpanded(g)
        xs, gs = shape(x), shape(g)
        if len(xs) < 3 or len(xs) != len(gs) or not view.ancestors[view.index[g]] >> view.index[x] & 1:
            continue
        channel = view.channel_dim(x) if len(xs) < 5 else 2
        places = [d for d in range(channel if len(xs) == 5 else 1, len(xs)) if d != channel]
        way = view.region(g, x)
        pooled = all(gs[d] == 1 for d in places) and (
            any(xs[d] > 1 for d in places) or (node.target in MULS and _pools(view, way)))
        if pooled and gs[channel] == xs[channel] and view.learned(way):
            return True
    return False


def _pools(view: ModuleGraph, mask: int) -> bool:
    """Whether a set of nodes takes a mean over positions, which on a map of one position the shapes do not show."""
    for node in view.members(mask):
        if node.target in POOLINGS:
            return True
        if node.op == "call_module":
            module = view.call_of(node).module
            inside = view.traces.view(module)
            if isinstance(module, _POOLING_LAYERS) or (inside is not None and _pools(inside, (1 << len(inside.nodes)) - 1)):
                return True
    return False


def gates_of(view: ModuleGraph) -> list[fx.Node]:
    """The gates among the nodes of a forward; looked for once for all modules that share it."""
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
