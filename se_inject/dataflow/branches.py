"""The branches of a forward that asks for sizes, each traced, and the same node on several of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from torch import fx, nn

from ..capture.forward import Forward, trace_forward
from ..capture.graphs import counterparts, same_graph, subgraph
from ..errors import Refusal

MOST = 32  # branches of one forward


@dataclasses.dataclass(eq=False)
class Branch:
    """One branch of a forward.

    Attributes:
        outcomes: Of its conditions, in order.
        conditions: Their nodes, in `graph` or in the part of it that was traced.
        graph: The trace; None where there is none.
        error: Why there is none.
        refused: Whether the author's code raises on this branch: no input takes it.
    """

    outcomes: tuple[bool, ...]
    conditions: tuple[fx.Node, ...]
    graph: fx.Graph | None
    error: str = ""
    refused: bool = False


def trace_branches(
    module: nn.Module, constants: dict[str, Any], reading: bool = False, unknown: Collection[str] = (), drawing: bool = False
) -> list[Branch]:
    """All branches of `module`'s forward, each traced. `module` is not changed. Other arguments are `trace_forward`'s.

    Raises:
        Refusal: There is one branch, which fx cannot follow, or there are too many.
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
            graph = trace_forward(module, constants, decide, reading, unknown, drawing)
        except Refusal as e:
            if not conditions:
                raise
            error, refused = str(e), _is_authors(e.__cause__)
        paths.append(Branch(tuple(outcomes), tuple(conditions), graph, error, refused))
        todo += [(*outcomes[:i], False) for i in range(len(prefix), len(outcomes))]
        if len(paths) + len(todo) > MOST:
            raise Refusal(f"{type(module).__name__}.forward has more than {MOST} branches by size")
    return paths


def _is_authors(error: BaseException | None) -> bool:
    """Whether the traced code raised an error on purpose, and not because it was traced."""
    if isinstance(error, AssertionError):
        return True
    at = None if error is None else error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    return at is not None and isinstance(error, (ValueError, RuntimeError)) and not str(
        at.tb_frame.f_globals.get("__name__")).startswith(("torch.fx.", "se_inject."))


def known_branch(graph: fx.Graph) -> Branch:
    """The branch of a forward that has one, with a trace that is at hand. `graph` is not changed."""
    return Branch((), (), subgraph(graph))


def same_branches(a: list[Branch], b: list[Branch], constants: dict[str, Any]) -> bool:
    """Whether two traces of one forward are the same; in `b` a placeholder may stand for its constant."""
    if len(a) != len(b):
        return False
    for x, y in zip(a, b):
        if x.outcomes != y.outcomes or (x.graph is None) != (y.graph is None):
            return False
        if x.graph is not None and y.graph is not None and not same_graph(x.graph, y.graph, constants):
            return False
    return True


def same_work(a: Branch, b: Branch) -> bool:
    """Whether two branches differ in nothing but their conditions."""
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


def branches(module: nn.Module, forward: Forward) -> bool:
    """Whether a forward has a branch that does something else than the traced one, or that fx cannot follow."""
    return bool(forward.decisions) and forward.shared("branches", lambda: _branches(module, forward))


def _branches(module: nn.Module, forward: Forward) -> bool:
    try:
        taken, others = _taken_and_others(module, forward)
    except Refusal:
        return True
    return any(not p.refused and not same_work(taken, p) for p in others)


def other_branches(module: nn.Module, forward: Forward) -> list[dict[fx.Node, fx.Node]]:
    """For each other branch of a forward that an input may take, and that does other work: the nodes of it by those of the
    traced branch. An empty dict stands for a branch that cannot be traced."""
    return forward.shared("other branches", lambda: _other_branches(module, forward)) if forward.decisions else []


def _other_branches(module: nn.Module, forward: Forward) -> list[dict[fx.Node, fx.Node]]:
    try:
        taken, others = _taken_and_others(module, forward)
    except Refusal:
        return [{}]
    return [
        {} if p.graph is None else counterparts(forward.graph, p.graph) for p in others
        if not p.refused and not same_work(taken, p)]


def _taken_and_others(module: nn.Module, forward: Forward) -> tuple[Branch, list[Branch]]:
    paths = trace_branches(module, forward.constants, reading=True)
    (taken,) = (p for p in paths if p.outcomes == forward.decisions)
    return taken, [p for p in paths if p is not taken]
