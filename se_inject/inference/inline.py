"""One graph of a module's forward with those of some of the modules that it calls put in."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import fx

from ..capture.forward import Unpacked
from ..capture.recording import Call
from ..dataflow.aliasing import describe_memory
from ..dataflow.branches import branches
from ..dataflow.value_flow import ValueFlow


@dataclasses.dataclass(eq=False)
class InlinedGraph:
    """The graph, and its values by the forward and the node that they were in; each node's ``meta`` is that of `describe`."""

    graph: fx.Graph
    nodes: dict[tuple[Call, fx.Node], Any]
    replaced: dict[fx.Node, fx.Node] = dataclasses.field(default_factory=dict)

    def at(self, call: Call, node: fx.Node) -> fx.Node:
        """What stands now for a node of a call's forward."""
        found: fx.Node = self.nodes[call, node]
        while found in self.replaced:
            found = self.replaced[found]
        return found


def cannot_inline(flow: ValueFlow, call: Call, inside: bool) -> str | None:
    """Why a forward cannot be part of a new graph, or None; `inside` says that it is to be put into another."""
    view = flow.traces.view(call.module)
    name = f"{type(call.module).__name__}.forward"
    if view is None:
        return flow.traces.failures.get(call.module, f"{name} is torch's own")
    if len(flow.traces.calls[call.module]) > 1:
        return f"{call.path or type(call.module).__name__} is called more than once"
    if "forward" in call.module.__dict__:
        return f"{call.path or type(call.module).__name__} has a forward of its own, which is not its class's"
    if inside and call.module in (flow.barriers or ()):
        return f"{call.path} has hooks"
    if branches(view):
        return f"{name} branches on sizes"
    constants = view.forward.constants.values()
    if inside and any(isinstance(v, Unpacked) for v in constants):
        return f"{name} takes a list"
    if any(v is not None and not isinstance(v, (bool, int, float, str, Unpacked)) for v in constants):
        return f"{name} depends on an argument that is no plain value"
    if any(str(n.target).startswith("*") for n in view.nodes if n.op == "placeholder"):
        return f"{name} takes any number of arguments"
    return None


def inline(flow: ValueFlow, root: Call, inside: Iterable[Call], persistent: set[int]) -> InlinedGraph:
    """The graph of `root`'s forward with those of the calls `inside` it put in, and without calls that pass their input on.

    `persistent` are the storages of the model's own tensors.
    """
    flat = InlinedGraph(fx.Graph(), {})
    expand = set(inside)

    def put(call: Call, prefix: str, given: dict[str, Any] | None) -> Any:
        view = flow.traces.view(call.module)
        assert view is not None
        env: dict[fx.Node, Any] = {}

        def mapped(value: Any) -> Any:
            return fx.map_arg(value, env.__getitem__)

        for node in view.nodes:
            if node.op == "output":
                return mapped(node.args[0])
            if node.op == "placeholder" and given is not None:
                env[node] = given.get(str(node.target), view.forward.constants.get(str(node.target)))
            elif node.op == "call_module" and flow.passes(view.call_of(node)) and isinstance(node.args[0], fx.Node):
                env[node] = env[node.args[0]]
            elif node.op == "call_module" and view.call_of(node) in expand:
                child = view.call_of(node)
                arguments = flow.bound(child.module, node)
                env[node] = put(child, f"{prefix}{node.target}.", {k: mapped(v) for k, v in arguments.items()})
            else:
                new = flat.graph.node_copy(node, env.__getitem__)
                if node.op in ("get_attr", "call_module"):
                    new.target = f"{prefix}{node.target}"
                new.meta = describe_memory(flow, view, node, env, persistent)
                env[node] = new
            flat.nodes[call, node] = env[node]
        return None

    flat.graph.output(put(root, "", None))
    return flat
