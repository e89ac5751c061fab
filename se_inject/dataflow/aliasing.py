"""Which values of a flat graph share memory, whose memory it is, and when it is read last."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.utils._pytree import tree_leaves

from ..capture.meta_ops import storage
from .module_graph import ModuleGraph
from .ops import ADDS, CATS, CONVS, DIVISIONS, LAYOUTS, MULS, SLICES
from .value_flow import ValueFlow

# Operators whose result is in new memory, or, where they work in place, in that of the input that the recorded run shows.
# What is on neither list may keep its result, or give out what it keeps.
_NEW = CONVS | ADDS | MULS | CATS | DIVISIONS | {
    F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.linear, operator.matmul, torch.matmul, torch.bmm, torch.addmm,
    F.batch_norm, F.layer_norm, F.group_norm, F.instance_norm, F.rms_norm, F.normalize, F.scaled_dot_product_attention,
    F.relu, F.relu_, F.relu6, F.gelu, F.silu, F.elu, F.mish, F.softplus, F.leaky_relu, F.hardswish, F.hardsigmoid, F.hardtanh,
    F.sigmoid, F.tanh, F.prelu, F.softmax, F.dropout, F.avg_pool2d, F.max_pool2d, F.adaptive_avg_pool2d, F.interpolate, F.pad,
    operator.sub, operator.isub, operator.itruediv, operator.neg, operator.pow, torch.sub, torch.addcmul, torch.stack,
    torch.where, torch.roll, torch.mean, torch.sum, torch.sigmoid, torch.tanh, torch.relu, torch.softmax, torch.clamp,
    "matmul", "bmm", "sub", "sub_", "neg", "pow", "clone", "repeat", "roll", "mean", "sum", "norm", "softmax", "sigmoid",
    "sigmoid_", "tanh", "relu", "relu_", "clamp", "exp", "sqrt", "rsqrt",
}  # fmt: skip
# Those whose result is a view of their input, or may be, by its strides, its dtype or its size.
_VIEWS = (LAYOUTS - {"expand", "expand_as"}) | SLICES | {
    "chunk", "split", "unbind", "select", "reshape_as", "float", "double", "half", "bfloat16", "type",
    torch.chunk, torch.split, torch.unbind}  # fmt: skip


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
        return True if node.target in _NEW else False if node.target in _VIEWS else None
    call, moved = view.call_of(node), False
    while True:
        view, node = flow.origin(view, node)
        if not call.begin <= view.call.begin < call.end:
            return False
        if node.op not in ("call_function", "call_method"):
            return None
        if node.target in _NEW:
            return not (moved and node.meta["writes"])  # in place, and then perhaps a view: of what, the run may not show
        source = node.args[0] if node.args else None
        if node.target not in _VIEWS or not isinstance(source, fx.Node):
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
