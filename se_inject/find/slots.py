"""Empty attention slots: attributes in which a model's author left room for channel attention."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import textwrap
from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from ..capture.forward import Forward, bind, own_forward
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
    identities = [
        node for node in view.nodes if node.op == "call_module" and type(content.get(str(node.target))) is nn.Identity
        and _usable(node) and _once(view, node) and _after_work(view, node)]
    if identities:
        node = next((n for n in identities if _is_default(type(view.module), str(n.target))), identities[0])
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
    extra = len(forward.graph.nodes) - len(view.nodes) - 1
    if extra == 0:
        return forward, calls[0], 1.0
    users = list(calls[0].users)
    if extra == 1 and len(users) == 1 and name_of(users[0]) == "mul":
        factors = [a for a in users[0].args if isinstance(a, (int, float))]
        if len(factors) == 1 and factors[0] in (0.5, 1.0, 2.0, 4.0):  # powers of two undo exactly
            return forward, calls[0], float(factors[0])
    return None


def kind_of(slot: Slot) -> str:
    return "inverted_residual" if is_inner(slot) else "conv"


def is_inner(slot: Slot) -> bool:
    """Whether a learned layer of the same forward follows the slot, as in an inverted residual."""
    bit = 1 << slot.view.index[slot.node]
    return any(
        slot.view.is_learned(n) and slot.view.ancestors[slot.view.index[n]] & bit
        for n in slot.view.nodes if n is not slot.node)
