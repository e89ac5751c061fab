"""Gradient checkpointing that an owner does in its own forward: the same stretches of it are recomputed after the rewrite."""

from __future__ import annotations

import itertools
import operator

from torch import fx
from torch.utils.checkpoint import checkpoint

from ..capture.forward import CHECKPOINTED


def checkpoints(graph: fx.Graph | None) -> bool:
    """Whether the author's code computes some of it inside `torch.utils.checkpoint`."""
    return graph is not None and any(CHECKPOINTED in n.meta for n in graph.nodes)


def keep_checkpoints(graph: fx.Graph | None, other: fx.Graph | None) -> None:
    """Mark in `graph`, in place, what is checkpointed in an equal graph: many authors do it in train mode alone."""
    if graph is not None and other is not None:
        for node, its in zip(graph.nodes, other.nodes):
            if CHECKPOINTED in its.meta:
                node.meta[CHECKPOINTED] = its.meta[CHECKPOINTED]


def outline(graph: fx.Graph, name: str) -> dict[str, fx.Graph]:
    """`graph` with each checkpointed stretch in a graph of its own, which it calls through `torch.utils.checkpoint`.

    Returns:
        The graphs by the names of the methods that they are to become; the first is ``<name>_checkpointed``.
    """
    whole = fx.Graph()
    graphs = {f"{name}_checkpointed": whole}
    copies: dict[fx.Node, fx.Node] = {}
    for stretch, group in itertools.groupby(list(graph.nodes), lambda n: n.meta.get(CHECKPOINTED)):
        nodes = dict.fromkeys(group)
        if stretch is None:
            for n in nodes:
                copies[n] = whole.node_copy(n, copies.__getitem__)
            continue
        inputs = dict.fromkeys(i for n in nodes for i in n.all_input_nodes if i not in nodes)
        outputs = [n for n in nodes if any(u not in nodes for u in n.users)]
        part = fx.Graph()
        inside = {i: part.placeholder(i.name) for i in inputs}
        for n in nodes:
            inside[n] = part.node_copy(n, inside.__getitem__)
        part.output(tuple(inside[n] for n in outputs))
        method = f"{name}_part_{len(graphs)}"
        graphs[method] = part
        call = whole.call_function(
            checkpoint, (whole.get_attr(method), *(copies[i] for i in inputs)), {"use_reentrant": False})
        for i, n in enumerate(outputs):
            copies[n] = whole.call_function(operator.getitem, (call, i))
    return graphs
