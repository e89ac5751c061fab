"""Graphs of forwards: copied in whole or in part, compared, computed node by node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import fx, nn

from ..errors import Refusal
from .calls import REST


def subgraph(graph: fx.Graph, nodes: Iterable[fx.Node] | None = None, output: fx.Node | None = None) -> fx.Graph:
    """A new graph of some nodes, in their order and without what is known about them. The inputs are always among them.

    Args:
        graph: Where the nodes are; not changed.
        nodes: Which; None is all. What one of them reads must be among them.
        output: What the new graph returns; None is what `graph` returns, if its output is among the nodes.
    """
    kept = None if nodes is None else set(nodes)
    new = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if (kept is None or node in kept or node.op == "placeholder") and not (node.op == "output" and output is not None):
            copies[node] = new.node_copy(node, copies.__getitem__)
            copies[node].meta = {}
    if output is not None:
        new.output(copies[output])
    return new


def sources_of(node: fx.Node) -> set[fx.Node]:
    """A node and all nodes that it is computed from."""
    found: set[fx.Node] = set()
    todo = [node]
    while todo:
        n = todo.pop()
        if n not in found:
            found.add(n)
            todo += n.all_input_nodes
    return found


def compute(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the operator of a node makes of these arguments.

    Raises:
        Refusal: The node is no operator, but an input, a parameter or the call of a module.
    """
    if node.op == "call_function":
        return node.target(*args, **kwargs)  # type: ignore[operator]
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    raise Refusal(f"{node} is no operator")


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
            if REST in y and REST not in x:
                y = {**constants.get(str(y[REST].target).lstrip("*"), {}), **{k: v for k, v in y.items() if k != REST}}
            return x.keys() == y.keys() and all(same(x[k], y[k]) for k in x)
        if isinstance(x, slice) and isinstance(y, slice):
            return same((x.start, x.stop, x.step), (y.start, y.stop, y.step))
        return type(x) is type(y) and bool(x == y or (x != x and y != y))  # not a number

    if len(a.nodes) != len(b.nodes):
        return False
    for x, y in zip(a.nodes, b.nodes):
        if x.op != y.op or x.target != y.target or not same(x.args, y.args) or not same(x.kwargs, y.kwargs):
            return False
        pairs[x] = y
    return True


def counterparts(a: fx.Graph, b: fx.Graph) -> dict[fx.Node, fx.Node]:
    """The nodes of `a` that are also in `b`: computed alike from the inputs, or alike on the way to the output."""
    numbers: dict[Any, int] = {}
    there = {number: node for node, number in number_nodes(b, numbers).items()}
    found = {node: there[number] for node, number in number_nodes(a, numbers).items() if number in there}
    taken = set(found.values())
    todo = [(output_of(a), output_of(b))]
    while todo:
        x, y = todo.pop()
        found[x] = y
        if len(x.all_input_nodes) != len(y.all_input_nodes):
            continue
        for n, m in zip(x.all_input_nodes, y.all_input_nodes):
            if n not in found and m not in taken and (n.op, n.target) == (m.op, m.target):
                taken.add(m)
                todo.append((n, m))
    return found


def output_of(graph: fx.Graph) -> fx.Node:
    out: fx.Node = next(n for n in reversed(graph.nodes) if n.op == "output")
    return out


def number_nodes(graph: fx.Graph, numbers: dict[Any, int]) -> dict[fx.Node, int]:
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


def evaluate(node: fx.Node, module: nn.Module, values: dict[str, Any], known: dict[fx.Node, Any]) -> Any:
    """The value of a node that depends on the sizes of arguments and parameters alone.

    Raises:
        Refusal: It depends on the contents of a tensor, or on a child.
    """
    if node not in known:
        if node.op == "placeholder":
            known[node] = values.get(str(node.target).lstrip("*"))
        elif node.op == "get_attr":
            tensors = {**module._parameters, **module._buffers}  # not through fx, which is tracing
            if node.target not in tensors:
                raise Refusal("it branches on what its children hold")
            known[node] = tensors[str(node.target)]
        elif node.op == "call_module":
            raise Refusal("it branches on what its layers compute")
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: evaluate(n, module, values, known))
            known[node] = compute(node, args, kwargs)
    return known[node]
