"""Empty attention slots: attributes in which a model's author left room for channel attention."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx, nn

from ..capture.arguments import bound
from ..capture.author_code import may_ask_for_children
from ..capture.forward import Forward, bind, marked, not_tensors, own_forward
from ..capture.graphs import subgraph
from ..dataflow.branches import Branch, same_branches, trace_branches
from ..dataflow.module_graph import ModuleGraph, TracedModel
from ..dataflow.ops import is_tensor, name_of, shape
from ..errors import Refusal

SLOT_NAMES = ("se", "attn", "attn2", "attn3", "attn_last")
_ABSENT = object()


@dataclasses.dataclass(eq=False)
class Slot:
    """A slot for a block.

    Attributes:
        name: Of the attribute.
        view, node: The call of its content, in a forward that was traced with the slot filled.
        gain: The factor that the author's code puts behind a filled slot (NFNet: 2), else 1.
        replaces: Whether the slot holds channel attention that the block replaces; else it is empty.
    """

    name: str
    view: ModuleGraph
    node: fx.Node
    gain: float
    replaces: bool = False


def _content(module: nn.Module, name: str) -> object:
    return module._modules.get(name, module.__dict__.get(name, _ABSENT))


def empty_slot(traces: TracedModel, view: ModuleGraph) -> Slot | None:
    """The empty slot of an owner that its forward calls once, if there is one.

    Of several, an `nn.Identity` goes before None, as it is called in any case; of several identities
    the one that the constructor's default names (ByobNet's ``attn_last=True``), else the first; of
    several None the last, which is the end of the branch (NFNet's default).
    """
    found = view.shared("empty slot", functools.partial(_find_empty, view))
    if found is None:
        return None
    name, forward, node, gain = found
    if forward is not view.forward:
        view = ModuleGraph(forward, view.call, bind(forward, view.call), traces)
    return Slot(name, view, node, gain)


def _find_empty(view: ModuleGraph) -> tuple[str, Forward, fx.Node, float] | None:
    content = {name: _content(view.module, name) for name in SLOT_NAMES}
    hooked = view.traces.hooked
    identities = [
        node for node in view.nodes if node.op == "call_module" and type(content.get(str(node.target))) is nn.Identity
        and view.call_of(node).module not in hooked and _usable(node) and _once(view, node) and _after_work(view, node)]
    cls: Any = type(view.module)
    identities.sort(key=lambda n: not _is_default(cls, str(n.target)))
    node = next((n for n in identities if not may_ask_for_children(cls)
                 or _changes_nothing_else(view, str(n.target))), None)
    if node is not None:
        return str(node.target), view.forward, node, 1.0
    probes = {name: _probe(view, name) for name, value in content.items() if value is None}
    found = [(name, *probe) for name, probe in probes.items() if probe is not None]
    return max(found, key=lambda f: list(f[1].graph.nodes).index(f[2]), default=None)


def gate_slot(view: ModuleGraph, gating: Mapping[nn.Module, bool]) -> Slot | None:
    """The owner's child that only gates its input, if there is one: attention that can be swapped.

    `gating` says of modules with channel attention whether they do nothing else.
    """
    for node in view.nodes:
        if node.op == "call_module" and node.target in view.module._modules and _usable(node) and (
                gating.get(view.call_of(node).module)) and _once(view, node):
            return Slot(str(node.target), view, node, 1.0, replaces=True)
    return None


@functools.lru_cache(maxsize=256)
def takes_activation(owner: Any, slot: str) -> bool:
    """Whether the author gives the owner's activation to the content of `slot`.

    The constructor tells: it does where ``self.<slot>`` is assigned a call with ``act_layer=``. EfficientNet and
    CSPNet do so; ResNet and ByobNet leave attention its ReLU.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(owner.__init__)))
    except (OSError, TypeError, SyntaxError):  # no source: the paper's ReLU
        return False
    for statement in ast.walk(tree):
        if not isinstance(statement, ast.Assign) or not any(
                isinstance(t, ast.Attribute) and t.attr == slot for t in statement.targets):
            continue
        for call in ast.walk(statement.value):
            if isinstance(call, ast.Call) and any(k.arg == "act_layer" for k in call.keywords):
                return True
    return False


def _is_default(owner: type[nn.Module], slot: str) -> bool:
    """Whether the owner's constructor has a flag of the slot's name, and it is set by default."""
    flag = inspect.signature(owner.__init__).parameters.get(slot)
    return flag is not None and flag.default is True


def _once(view: ModuleGraph, node: fx.Node) -> bool:
    return sum(n.target == node.target for n in view.nodes if n.op == "call_module") == 1


def _usable(node: fx.Node) -> bool:
    return is_tensor(node) and len(shape(node)) >= 3 and len(node.args) == 1 and node.meta["val"].is_floating_point()


def _after_work(view: ModuleGraph, node: fx.Node) -> bool:
    """Whether a learned layer of the same forward comes before `node`; else a gate there would scale the shortcut, too."""
    return any(view.is_learned(n) for n in view.members(view.ancestors[view.index[node]]) if n is not node)


def _probe(view: ModuleGraph, name: str) -> tuple[Forward, fx.Node, float] | None:
    """Fill a None slot with a marker and find the place and the gain of its call; None where the forward does not call it."""
    try:
        forward, _ = own_forward(view.call, marker=name)
    except Refusal:
        return None
    calls = [n for n in forward.graph.nodes if n.op == "call_module" and n.target == name]
    if len(calls) != 1 or not _usable(calls[0]):
        return None
    users = list(calls[0].users)
    product = users[0].args if len(users) == 1 and name_of(users[0]) == "mul" else ()
    factors = [a for a in product if isinstance(a, (int, float))]
    for gain in (None, *(f for f in factors if f in (0.5, 1.0, 2.0, 4.0))):  # powers of two undo exactly
        if _changes_nothing_else(view, name, functools.partial(_without, name=name, gain=gain), forward):
            return forward, calls[0], 1.0 if gain is None else float(gain)
    return None


def _changes_nothing_else(
    view: ModuleGraph, name: str, without: Callable[[fx.Graph], fx.Graph] = lambda graph: graph, filled: Forward | None = None
) -> bool:  # fmt: skip
    """Whether a forward does the same, on each of its branches, where a slot of it is filled.

    Args:
        view: The forward.
        name: The slot.
        without: Takes out of the graph with the filled slot what may be there more.
        filled: The forward with the filled slot, where it was traced.
    """
    forward, unknown = view.forward, not_tensors(bound(view.call)[1])
    try:
        if filled is not None and not filled.decisions:
            full = [Branch((), (), filled.graph)]
        else:
            with marked(view.module, name):
                full = trace_branches(view.module, forward.constants, unknown=unknown)
        empty = trace_branches(view.module, forward.constants, unknown=unknown) if forward.decisions else [
            Branch((), (), forward.graph)]
    except Refusal:
        return False
    if any(n.target == name and (len(n.args) != 1 or n.kwargs) for b in full if b.graph is not None for n in b.graph.nodes):
        return False
    full = [b if b.graph is None else dataclasses.replace(b, graph=without(b.graph)) for b in full]
    return same_branches(empty, full, {})


def _without(graph: fx.Graph, name: str, gain: float | None) -> fx.Graph:
    """A graph without the calls of a slot, and without the gain behind them if there is one."""
    graph = subgraph(graph)
    for call in [n for n in graph.nodes if n.op == "call_module" and n.target == name]:
        for product in [u for u in call.users if gain is not None and name_of(u) == "mul" and gain in u.args]:
            product.replace_all_uses_with(call)
            graph.erase_node(product)
        call.replace_all_uses_with(call.args[0])
        graph.erase_node(call)
    return graph


def kind_of(slot: Slot) -> str:
    return "inverted_residual" if is_inner(slot) else "conv"


def is_inner(slot: Slot) -> bool:
    """Whether a learned layer of the same forward follows the slot, as in an inverted residual."""
    bit = 1 << slot.view.index[slot.node]
    return any(
        slot.view.is_learned(n) and slot.view.ancestors[slot.view.index[n]] & bit
        for n in slot.view.nodes if n is not slot.node)
