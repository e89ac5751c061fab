"""Several forwards as one graph: a module's, with those of modules that it calls in place of the calls."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import fx, nn

from ..capture.arguments import Unpacked
from ..capture.recording import Call
from ..dataflow.aliasing import describe_memory
from ..dataflow.branches import branches
from ..dataflow.value_flow import ValueFlow
from ..errors import Refusal


@dataclasses.dataclass(frozen=True, eq=False)
class Region:
    """A forward to rewrite, that of `root`, and the calls inside it that are inlined.

    A call is inlined with all calls between it and `root`.
    """

    root: Call
    inlined: frozenset[Call] = frozenset()

    @property
    def calls(self) -> frozenset[Call]:
        return self.inlined | {self.root}


def common_region(flow: ValueFlow, a: Call, b: Call) -> Region:
    """The smallest region with both calls.

    Raises:
        Refusal: One of its forwards cannot be rewritten or inlined.
    """
    chains = [_with_callers(a), _with_callers(b)]
    root = next(c for c in chains[0] if c in chains[1])
    inlined = {c for chain in chains for c in chain[:chain.index(root)]}
    for call in sorted({root, *inlined}, key=lambda c: c.begin):
        check_rewritable(flow, call, inlined=call is not root)
    return Region(root, frozenset(inlined))


def _with_callers(call: Call) -> list[Call]:
    chain = [call]
    while chain[-1].parent is not None:
        chain.append(chain[-1].parent)
    return chain


def check_rewritable(flow: ValueFlow, call: Call, *, inlined: bool) -> None:
    """
    Args:
        flow: The values of the recorded run.
        call: The call of a module.
        inlined: Whether the module's forward goes into another.

    Raises:
        Refusal: The module's forward cannot be rewritten, or not be inlined.
    """
    view = flow.traces.view(call.module)
    name, path = f"{type(call.module).__name__}.forward", call.path or type(call.module).__name__
    if view is None:
        raise Refusal(flow.traces.failures.get(call.module, f"{name} is torch's own"))
    if len(flow.traces.calls[call.module]) > 1:
        raise Refusal(f"{path} is called more than once")
    check_plain(flow, call.module, path, may_have_hooks=not inlined)
    if branches(view):
        raise Refusal(f"{name} branches on sizes")
    constants = view.forward.constants.values()
    if inlined and any(isinstance(v, Unpacked) for v in constants):
        raise Refusal(f"{name} takes a list")
    if any(v is not None and not isinstance(v, (bool, int, float, str, Unpacked)) for v in constants):
        raise Refusal(f"{name} depends on an argument that is no plain value")
    if any(str(n.target).startswith("*") for n in view.nodes if n.op == "placeholder"):
        raise Refusal(f"{name} takes any number of arguments")


def check_plain(flow: ValueFlow, module: nn.Module, name: str, *, may_have_hooks: bool = False) -> None:
    """
    Raises:
        Refusal: The module, called `name` in the message, does more than its class's forward: it has a forward of its own,
            or hooks, which may see or change its input and output.
    """
    if not may_have_hooks and module in (flow.barriers or ()):
        raise Refusal(f"{name} has hooks")
    if "forward" in module.__dict__:
        raise Refusal(f"{name} has a forward that is not its class's")


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
