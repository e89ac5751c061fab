"""The ways through a forward that branches on sizes, and the same place on each of them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

from torch import fx, nn

from .errors import TraceError
from .trace import copy_graph, trace_forward

MOST = 32  # ways through one forward


@dataclasses.dataclass(eq=False)
class Path:
    """One way through a forward: the outcomes of its conditions in order, and the graph, or why there is none.

    `conditions` are nodes of `graph`, or of what was traced of it. `refused` says that the author's code raised there: no
    input goes that way.
    """

    outcomes: tuple[bool, ...]
    conditions: tuple[fx.Node, ...]
    graph: fx.Graph | None
    error: str = ""
    refused: bool = False


def trace_paths(module: nn.Module, constants: dict[str, Any], reading: bool = False) -> list[Path]:
    """All ways through `module`'s forward, each traced; `reading` is `trace_forward`'s. `module` is not changed.

    Raises:
        TraceError: There is one way, which fx cannot follow, or there are too many.
    """
    paths: list[Path] = []
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
        except TraceError as e:
            if not conditions:
                raise
            error, refused = str(e), _is_authors(e.__cause__)
        paths.append(Path(tuple(outcomes), tuple(conditions), graph, error, refused))
        todo += [(*outcomes[:i], False) for i in range(len(prefix), len(outcomes))]
        if len(paths) + len(todo) > MOST:
            raise TraceError(f"{type(module).__name__}.forward branches on sizes in more than {MOST} ways")
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


def known_path(graph: fx.Graph) -> Path:
    """A forward with one way, which was traced before. `graph` is not changed."""
    return Path((), (), copy_graph(graph))


def same_paths(a: list[Path], b: list[Path], constants: dict[str, Any]) -> bool:
    """Whether two traces of one forward do the same; in `b` a placeholder may stand for its constant."""
    if len(a) != len(b):
        return False
    for x, y in zip(a, b):
        if x.outcomes != y.outcomes or (x.graph is None) != (y.graph is None):
            return False
        if x.graph is not None and y.graph is not None and not same_graph(x.graph, y.graph, constants):
            return False
    return True


def same_graph(a: fx.Graph, b: fx.Graph, constants: dict[str, Any]) -> bool:
    """Whether two graphs are the same; in `b` a placeholder may stand for its constant."""
    pairs: dict[fx.Node, fx.Node] = {}

    def same(x: Any, y: Any) -> bool:
        if isinstance(x, fx.Node) and isinstance(y, fx.Node):
            return pairs.get(x) is y
        if isinstance(y, fx.Node):
            if y.op != "placeholder" or y.target not in constants:
                return False
            return x is constants[y.target] or (type(x) is type(constants[y.target]) and x == constants[y.target])
        if isinstance(x, (list, tuple)) and isinstance(y, (list, tuple)):
            return len(x) == len(y) and all(map(same, x, y))
        if isinstance(x, dict) and isinstance(y, dict):
            return x.keys() == y.keys() and all(same(x[k], y[k]) for k in x)
        if isinstance(x, slice) and isinstance(y, slice):
            return same((x.start, x.stop, x.step), (y.start, y.stop, y.step))
        return type(x) is type(y) and bool(x == y)

    if len(a.nodes) != len(b.nodes):
        return False
    for x, y in zip(a.nodes, b.nodes):
        if x.op != y.op or x.target != y.target or not same(x.args, y.args) or not same(x.kwargs, y.kwargs):
            return False
        pairs[x] = y
    return True


def same_work(a: Path, b: Path) -> bool:
    """Whether two ways through a forward differ in nothing but what they ask to find the way."""
    return a.graph is not None and b.graph is not None and same_graph(_without_conditions(a), _without_conditions(b), {})


def _without_conditions(path: Path) -> fx.Graph:
    assert path.graph is not None
    gone: set[fx.Node] = set()
    asked = set(path.conditions)
    for node in reversed(path.graph.nodes):
        if node in asked and node.op != "placeholder" and all(u in gone for u in node.users):
            gone.add(node)
            asked.update(node.all_input_nodes)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in path.graph.nodes:
        if node not in gone:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return graph


def counterparts(a: fx.Graph, b: fx.Graph) -> dict[fx.Node, fx.Node]:
    """The nodes of `a` that are also in `b`: computed alike from the inputs, or alike on the way to the output."""
    numbers: dict[Any, int] = {}
    there = {number: node for node, number in _number(b, numbers).items()}
    found = {node: there[number] for node, number in _number(a, numbers).items() if number in there}
    taken = set(found.values())
    ways = [(_output(a), _output(b))]
    while ways:
        x, y = ways.pop()
        found[x] = y
        if len(x.all_input_nodes) != len(y.all_input_nodes):
            continue
        for n, m in zip(x.all_input_nodes, y.all_input_nodes):
            if n not in found and m not in taken and (n.op, n.target) == (m.op, m.target):
                taken.add(m)
                ways.append((n, m))
    return found


def _output(graph: fx.Graph) -> fx.Node:
    out: fx.Node = next(n for n in reversed(graph.nodes) if n.op == "output")
    return out


def _number(graph: fx.Graph, numbers: dict[Any, int]) -> dict[fx.Node, int]:
    """A number for each node, the same for nodes of two graphs that are computed alike from the inputs."""
    out: dict[fx.Node, int] = {}
    seen: Counter[Any] = Counter()
    for node in graph.nodes:
        if node.op != "output":
            arguments = repr(fx.map_arg((node.args, node.kwargs), lambda n: f"<{out[n]}>"))
            what = (node.op, node.target, arguments)
            out[node] = numbers.setdefault((*what, seen[what]), len(numbers))
            seen[what] += 1
    return out
