"""Who shares memory: which values of an inlined graph, whose memory it is, and when it is read last."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from ..capture.meta_ops import storage
from . import ops
from .module_graph import ModuleGraph
from .ops import NEW, VIEW
from .value_flow import ValueFlow


def describe_memory(
    flow: ValueFlow, view: ModuleGraph, node: fx.Node, env: dict[fx.Node, Any], persistent: set[int]
) -> dict[str, Any]:
    """The meta of a node of an inlined graph.

    Args:
        flow: Of the model.
        view, node: The forward and the node that is copied into the inlined graph.
        env: The values in the inlined graph that stand for its inputs.
        persistent: The storages of the model's own tensors.

    Returns:
        ``val``, the value in the recorded run. ``may_alias``, the inputs whose memory it may share. ``is_external``: the memory
        may belong to someone outside the graph (an input, a weight, a cache); never write to it. ``retains_inputs``, whether
        the operator may keep its inputs, too.
    """
    value = node.meta["val"]
    meta: dict[str, Any] = {"val": value, "may_alias": [], "is_external": False, "retains_inputs": False}
    mine = storages(value)
    if node.op in ("placeholder", "get_attr"):
        meta["is_external"] = True
    elif mine:
        meta["retains_inputs"] = node.op == "call_module" and flow.keeps(view.call_of(node))
        new = None if meta["retains_inputs"] else _is_new(flow, view, node)
        meta["may_alias"] = [env[n] for n in node.all_input_nodes if isinstance(env[n], fx.Node) and (
            mine & storages(n.meta["val"]) if new else storages(n.meta["val"]))]
        meta["is_external"] = new is None or bool(mine & persistent)
    return meta


def _is_new(flow: ValueFlow, view: ModuleGraph, node: fx.Node) -> bool | None:
    """Whether a value is in memory that its node takes. False: it may be a view of an input. None: that is not known."""
    if node.op != "call_module":
        return {NEW: True, VIEW: False}.get(ops.of(node).memory or "")
    call, moved = view.call_of(node), False
    while True:
        view, node = flow.origin(view, node)
        if not call.begin <= view.call.begin < call.end:
            return False
        if node.op not in ("call_function", "call_method"):
            return None
        memory = ops.of(node).memory
        if memory == NEW:
            return not (moved and node.meta["writes"])  # a view after a write in place: the run may not show of which input
        source = node.args[0] if node.args else None
        if memory != VIEW or not isinstance(source, fx.Node):
            return None
        node, moved = source, True


def storages(value: Any) -> set[int]:
    """The storages of the tensors in a value."""
    return {storage(t) for t in tree_leaves(value) if isinstance(t, torch.Tensor)}


class Memory:
    """The values of an inlined graph in groups that may share memory, and when each is read last."""

    def __init__(self, graph: fx.Graph) -> None:
        self.index = {node: i for i, node in enumerate(graph.nodes)}
        self._group: dict[fx.Node, list[fx.Node]] = {}
        self._external: dict[int, bool] = {}
        for node in graph.nodes:
            if node.op != "output":
                self.add(node, node.meta.get("may_alias", ()), node.meta.get("is_external", False))
                if node.meta.get("retains_inputs", False):
                    self._external.update((id(self._group[n]), True) for n in node.all_input_nodes)

    def add(self, node: fx.Node, shares: Iterable[fx.Node], is_external: bool = False) -> None:
        group = [node]
        for other in shares:
            more = self._group[other]
            if more is not group:
                group += more
                is_external = is_external or self._external[id(more)]
                for n in more:
                    self._group[n] = group
        self._group[node] = group
        self._external[id(group)] = is_external

    def is_free(self, node: fx.Node, at: fx.Node, others: Iterable[fx.Node] = ()) -> bool:
        """Whether `at` may write into the memory of a value.

        It may where the memory is the graph's own and dense, nothing but the result of `at` is read from it later, and
        the other operands of `at` are elsewhere.
        """
        group = self._group[node]
        value = node.meta["val"]
        dense = all(n == 1 or s != 0 for n, s in zip(value.shape, value.stride()))
        return dense and not self._external[id(group)] and not self.is_read_after(node, at) and all(
            n is node or self._group[n] is not group for n in others)

    def is_external(self, node: fx.Node) -> bool:
        return self._external[id(self._group[node])]

    def is_read_after(self, node: fx.Node, at: fx.Node) -> bool:
        """Whether the memory of a value, with its contents before `at`, is read later."""
        place = self.index[at]
        return any(self.index[u] > place for n in self._group[node] if self.index[n] < place for u in n.users)

    def replace(self, old: fx.Node, new: fx.Node, into: fx.Node | None) -> None:
        """Put `new`, which writes into the memory of `into` or takes its own, in the place of `old`."""
        self.index[new] = self.index[old]
        new.meta = {"val": old.meta["val"]}
        self.add(new, [old] if into is None else [old, into])
        old.replace_all_uses_with(new)
