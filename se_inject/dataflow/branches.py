"""The ways through a forward that branches on sizes, and the same place on each of them."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import fx, nn

from ..capture.forward import trace_forward
from ..capture.graphs import counterparts, same_graph, subgraph
from ..errors import Refusal
from .module_graph import ModuleGraph

MOST = 32  # ways through one forward


@dataclasses.dataclass(eq=False)
class Branch:
    """One way through a forward: the outcomes of its conditions in order, and the graph, or why there is none.

    `conditions` are nodes of `graph`, or of what was traced of it. `refused` says that the author's code raised there: no
    input goes that way.
    """

    outcomes: tuple[bool, ...]
    conditions: tuple[fx.Node, ...]
    graph: fx.Graph | None
    error: str = ""
    refused: bool = False


def trace_branches(module: nn.Module, constants: dict[str, Any], reading: bool = False) -> list[Branch]:
    """All ways through `module`'s forward, each traced; `reading` is `trace_forward`'s. `module` is not changed.

    Raises:
        Refusal: There is one way, which fx cannot follow, or there are too many.
    """
    paths: list[Branch] = []
    todo: list[tuple[bool, ...]] = [()]
    while todo:
        prefix = todo.pop()
        outcomes: list[bool] = []
        conditions: list[fx.Node] = []

        def decide(node: fx.Node) -> bool:
            outcomes.append(prefix[len(outcomes)] if len(outcomes) < len(prefix) else True)  # noqa: B023
            conditions.append(node)  # noqa: B023
            return outcomes[-1]  # noqa: B023

        graph, error, refused = None, "", False
        try:
            graph = trace_forward(module, constants, decide, reading)
        except Refusal as e:
            if not conditions:
                raise
            error, refused = str(e), _is_authors(e.__cause__)
        paths.append(Branch(tuple(outcomes), tuple(conditions), graph, error, refused))
        todo += [(*outcomes[:i], False) for i in range(len(prefix), len(outcomes))]
        if len(paths) + len(todo) > MOST:
            raise Refusal(f"{type(module).__name__}.forward branches on sizes in more than {MOST} ways")
    return paths


def _is_authors(error: BaseException | None) -> bool:
    """Whether an error is one that the traced code means to raise, and not one of tracing it."""
    if isinstance(error, AssertionError):
        return True
    at = None if error is None else error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    return at is not None and isinstance(error, (ValueError, RuntimeError)) and not str(
        at.tb_frame.f_globals.get("__name__")).startswith(("torch.fx.", "se_inject."))


def known_branch(graph: fx.Graph) -> Branch:
    """A forward with one way, which was traced before. `graph` is not changed."""
    return Branch((), (), subgraph(graph))


def same_branches(a: list[Branch], b: list[Branch], constants: dict[str, Any]) -> bool:
    """Whether two traces of one forward do the same; in `b` a placeholder may stand for its constant."""
    if len(a) != len(b):
        return False
    for x, y in zip(a, b):
        if x.outcomes != y.outcomes or (x.graph is None) != (y.graph is None):
            return False
        if x.graph is not None and y.graph is not None and not same_graph(x.graph, y.graph, constants):
            return False
    return True


def same_work(a: Branch, b: Branch) -> bool:
    """Whether two ways through a forward differ in nothing but what they ask to find the way."""
    return a.graph is not None and b.graph is not None and same_graph(_without_conditions(a), _without_conditions(b), {})


def _without_conditions(path: Branch) -> fx.Graph:
    assert path.graph is not None
    gone: set[fx.Node] = set()
    asked = set(path.conditions)
    for node in reversed(path.graph.nodes):
        if node in asked and node.op != "placeholder" and all(u in gone for u in node.users):
            gone.add(node)
            asked.update(node.all_input_nodes)
    return subgraph(path.graph, [node for node in path.graph.nodes if node not in gone])


def branches(view: ModuleGraph) -> bool:
    """Whether a forward has another way, which does something else, or which fx cannot follow."""
    return bool(view.forward.decisions) and view.shared("branches", lambda: _branches(view))


def _branches(view: ModuleGraph) -> bool:
    try:
        paths = trace_branches(view.module, view.forward.constants, reading=True)
    except Refusal:
        return True
    (taken,) = (p for p in paths if p.outcomes == view.forward.decisions)
    return any(not p.refused and p is not taken and not same_work(taken, p) for p in paths)


def other_ways(view: ModuleGraph) -> list[dict[fx.Node, fx.Node]]:
    """For each other way through a forward on which layers are called, the nodes that are those of the traced one."""
    return view.shared("other ways", lambda: _other_ways(view)) if view.forward.decisions else []


def _other_ways(view: ModuleGraph) -> list[dict[fx.Node, fx.Node]]:
    try:
        paths = trace_branches(view.module, view.forward.constants, reading=True)
    except Refusal:
        return [{}]
    (taken,) = (p for p in paths if p.outcomes == view.forward.decisions)
    return [
        counterparts(view.forward.graph, p.graph) for p in paths
        if p is not taken and p.graph is not None and not same_work(taken, p) and any(
            n.op in ("call_module", "get_attr") for n in p.graph.nodes)]
