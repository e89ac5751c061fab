"""Which values of a flat graph share memory, whose memory it is, and when it is read last."""

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
    """The meta of a node of a flat graph: `val`, its value in the recorded run; `shares`, the inputs whose memory it may be in;
    `pinned`, whether that may be another's memory; and `keeps`, whether its inputs may be kept, too.

    `node` is that in the forward of `view`, and `env` says what stands for its inputs. `persistent` are the storages of the
    model's own tensors.
    """
    value = node.meta["val"]
    meta: dict[str, Any] = {"val": value, "shares": [], "pinned": False, "keeps": False}
    mine = storages(value)
    if node.op in ("placeholder", "get_attr"):
        meta["pinned"] = True
    elif mine:
        meta["keeps"] = node.op == "call_module" and flow.keeps(view.call_of(node))
        new = None if meta["keeps"] else _is_new(flow, view, node)
        meta["shares"] = [env[n] for n in node.all_input_nodes if isinstance(env[n], fx.Node) and (
            mine & storages(n.meta["val"]) if new else storages(n.meta["val"]))]
        meta["pinned"] = new is None or bool(mine & persistent)
    return meta


def _is_new(flow: ValueFlow, view: ModuleGraph, node: fx.Node) -> bool | None:
    """Whether a value is in memory that its node takes; False where it may be a view of an input, None where that is not
    known."""
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
            return not (moved and node.meta["writes"])  # in place, and then perhaps a view: of what, the run may not show
        source = node.args[0] if node.args else None
        if memory != VIEW or not isinstance(source, fx.Node):
            return None
        node, moved = source, True


def storages(value: Any) -> set[int]:
    """The memory of the tensors in a value."""
    return {storage(t) for t in tree_leaves(value) if isinstance(t, torch.Tensor)}


class Memory:
    """Which values of a flat graph share memory, and when it is read last."""

    def __init__(self, graph: fx.Graph) -> None:
        self.index = {node: i for i, node in enumerate(graph.nodes)}
        self._group: dict[fx.Node, list[fx.Node]] = {}
        self._pinned: dict[int, bool] = {}
        for node in graph.nodes:
            if node.op != "output":
                self.add(node, node.meta.get("shares", ()), node.meta.get("pinned", False))
                if node.meta.get("keeps", False):
                    self._pinned.update((id(self._group[n]), True) for n in node.all_input_nodes)

    def add(self, node: fx.Node, shares: Iterable[fx.Node], pinned: bool = False) -> None:
        group = [node]
        for other in shares:
            more = self._group[other]
            if more is not group:
                group += more
                pinned = pinned or self._pinned[id(more)]
                for n in more:
                    self._group[n] = group
        self._group[node] = group
        self._pinned[id(group)] = pinned

    def is_free(self, node: fx.Node, at: fx.Node, others: Iterable[fx.Node] = ()) -> bool:
        """Whether `at` may write into the memory of a value: it is the graph's own and dense, nothing but what comes of `at`
        reads it afterwards, and `at`'s other operands are elsewhere."""
        group = self._group[node]
        value = node.meta["val"]
        dense = all(n == 1 or s != 0 for n, s in zip(value.shape, value.stride()))
        return dense and not self._pinned[id(group)] and not self.is_read_after(node, at) and all(
            n is node or self._group[n] is not group for n in others)

    def is_pinned(self, node: fx.Node) -> bool:
        return self._pinned[id(self._group[node])]

    def is_read_after(self, node: fx.Node, at: fx.Node) -> bool:
        """Whether the memory of a value, as it is before `at`, is read later."""
        place = self.index[at]
        return any(self.index[u] > place for n in self._group[node] if self.index[n] < place for u in n.users)

    def replace(self, old: fx.Node, new: fx.Node, into: fx.Node | None) -> None:
        """Let `new`, which writes into the memory of `into` or makes its own, stand for `old`."""
        self.index[new] = self.index[old]
        new.meta = {"val": old.meta["val"]}
        self.add(new, [old] if into is None else [old, into])
        old.replace_all_uses_with(new)
