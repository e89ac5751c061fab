"""Who shares memory, when it is written, and when it is read last: in one forward, across forwards, in an inlined graph."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from ..capture.calls import Call
from ..capture.containers import tensors_in
from ..capture.meta_ops import storage
from ..errors import Refusal
from . import ops
from .module_graph import ModuleGraph
from .ops import NEW, VIEW
from .value_flow import ValueFlow


def writes_after(view: ModuleGraph, place: int, memory: set[int]) -> bool:
    """Whether a node after this position writes into one of these storages."""
    return any(view.last_writes.get(s, -1) > place for s in memory)


def is_read_elsewhere(view: ModuleGraph, node: fx.Node) -> bool:
    """Whether the memory of `node`'s value is written and then read where a gate would not reach: through an earlier node, or
    by the caller that owns the memory."""
    mine = storage(node.meta["val"])
    if mine in view.last_writes and _is_read_past(view, node, {mine}):
        return True
    if not any(n.op == "placeholder" for n in _by_storage(view).get(mine, ())):
        return False
    flow = ValueFlow(view.traces)
    for call in view.traces.calls[view.module]:
        try:
            at = view if call is view.call else view.traces.inside(call)
            memory = {mine} if at.forward is view.forward else {
                s for n in at.nodes if n.op == "placeholder" for s in storages(n.meta["val"])}
            above = _in_caller(flow, at, memory)
            while above is not None:
                at, node, memory = above
                if writes_after(at, at.index[node], memory) and _is_read_past(at, node, memory):
                    return True
                above = _in_caller(flow, at, memory)
        except Refusal:  # fx cannot follow a forward around
            return True
    return False


def _is_read_past(view: ModuleGraph, node: fx.Node, memory: set[int]) -> bool:
    """Whether memory is read after `node`, other than through its value: through an earlier node, or by the caller where that
    owns it and it is written."""
    here, by_storage = view.index[node], _by_storage(view)
    return any(
        (n.op == "placeholder" and writes_after(view, here, {s})) or (
            view.index[n] < here and any(view.index[u] > here for u in n.users))
        for s in memory for n in by_storage.get(s, ()))


def _by_storage(view: ModuleGraph) -> dict[int, list[fx.Node]]:
    def find() -> dict[int, list[fx.Node]]:
        found: dict[int, list[fx.Node]] = defaultdict(list)
        for n in view.nodes:
            for s in storages(n.meta.get("val")):
                found[s].append(n)
        return found

    return view.shared("by storage", find)


def written_between(flow: ValueFlow, view: ModuleGraph, node: fx.Node, end: Call) -> bool:
    """Whether something writes into the memory of a value after it is computed and before the call `end` is over.

    `node` computes the value in the forward `view`. Where `end` is outside that forward, the search goes on in its caller's,
    for the memory that the caller gave or gets back, up to the forward that `end` is inside of.
    """
    place, memory = view.index[node], {storage(node.meta["val"])}
    while True:
        if writes_after(view, place, memory):
            return True
        above = None if view.call.begin <= end.begin < view.call.end else _in_caller(flow, view, memory)
        if above is None:
            return False
        view, node, memory = above
        place = view.index[node]


def _in_caller(flow: ValueFlow, view: ModuleGraph, memory: set[int]) -> tuple[ModuleGraph, fx.Node, set[int]] | None:
    """The forward that calls `view`'s module, the node that does, and those of its storages that are in `memory` there.

    None for the model itself, and where the caller does not have the memory.
    """
    above = flow.caller(view)
    if above is None:
        return None
    outer, call = above
    # each trace has memory of its own: arguments and result pair that of this trace with that of the caller's
    given = flow.bound(view.module, call)
    pairs: list[tuple[Any, Any]] = [(view.nodes[-1].args[0], call)]
    pairs += [(n, given.get(str(n.target))) for n in itertools.takewhile(lambda n: n.op == "placeholder", view.nodes)]
    theirs = {
        s for inner, out in pairs if isinstance(inner, fx.Node) and isinstance(out, fx.Node)
        and memory & storages(inner.meta["val"]) for s in storages(out.meta["val"])}
    return (outer, call, theirs) if theirs else None


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
        try:
            view, node = flow.origin(view, node)
        except Refusal:  # fx cannot follow a forward around
            return None
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
    return set(map(storage, tensors_in(value)))


def _is_dense(t: torch.Tensor) -> bool:
    """Whether a tensor has its values one after the other, in some order of its axes."""
    step = 1
    for stride, size in sorted((stride, size) for stride, size in zip(t.stride(), t.shape) if size != 1):
        if stride != step:
            return False
        step *= size
    return True


class Memory:
    """The values of an inlined graph in groups that may share memory, and when each is read last.

    Args:
        graph: With what `describe_memory` tells of its nodes.
        may_write: Whether any of them may be written by another operator than the author's.
    """

    def __init__(self, graph: fx.Graph, may_write: bool = True) -> None:
        self.may_write = may_write
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

        It may where the memory is the graph's own, laid out as the result of `at` is and dense, nothing but that result is read
        from it later, and the other operands of `at` are elsewhere.
        """
        group = self._group[node]
        value, result = node.meta["val"], at.meta["val"]
        alike = value.shape == result.shape and value.stride() == result.stride() and _is_dense(value)
        return self.may_write and alike and not self._external[id(group)] and not self.is_read_after(node, at) and all(
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
