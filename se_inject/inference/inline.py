"""Several forwards as one graph: a module's, with those of modules that it calls in place of the calls."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import fx

from ..capture.calls import Call
from ..dataflow.aliasing import describe_memory
from ..dataflow.value_flow import ValueFlow
from .rewritable import Region, forward_of


@dataclasses.dataclass(eq=False)
class InlinedGraph:
    """A graph of several forwards.

    `nodes` are the graph's values, by a call and a node of the called forward. The ``meta`` of each node is as
    `describe_memory` says.
    """

    graph: fx.Graph
    nodes: dict[tuple[Call, fx.Node], Any]
    _replaced: dict[fx.Node, fx.Node] = dataclasses.field(default_factory=dict)

    def at(self, call: Call, node: fx.Node) -> fx.Node:
        """The node of this graph for a node of a call's forward."""
        found: fx.Node = self.nodes[call, node]
        while found in self._replaced:
            found = self._replaced[found]
        return found

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let `new` stand for `old`, which is erased."""
        for user in old.users:
            user.meta["may_alias"] = [new if n is old else n for n in user.meta.get("may_alias", ())]
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)
        self._replaced[old] = new


def inline(flow: ValueFlow, region: Region, weights: set[int]) -> InlinedGraph:
    """The graph of a region's forwards, without the calls that return their input.

    `weights` are the storages of the model's parameters and buffers.
    """
    result = InlinedGraph(fx.Graph(), {})

    def put(call: Call, prefix: str, given: dict[str, Any] | None) -> Any:
        """Put a call's forward into the graph; its result there. `given` are the arguments; the root has placeholders."""
        view = forward_of(flow, call)
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
            elif node.op == "call_module" and view.call_of(node) in region.inlined:
                child = view.call_of(node)
                arguments = flow.bound(child.module, node)
                env[node] = put(child, f"{prefix}{node.target}.", {k: mapped(v) for k, v in arguments.items()})
            else:
                new = result.graph.node_copy(node, env.__getitem__)
                if node.op in ("get_attr", "call_module"):
                    new.target = f"{prefix}{node.target}"
                new.meta = describe_memory(flow, view, node, env, weights)
                env[node] = new
            result.nodes[call, node] = env[node]
        return None

    result.graph.output(put(region.root, "", None))
    return result
