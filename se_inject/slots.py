"""Empty attention slots: places where a model's author left room for channel attention."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap

from torch import fx, nn

from .attention import Gates
from .errors import TraceError
from .graph import MULS, Traces, View, is_tensor, shape
from .trace import Marker, own_graph

SLOT_NAMES = ("se", "attn", "attn2", "attn3", "attn_last")
_ABSENT = object()


@dataclasses.dataclass(eq=False)
class Slot:
    """An empty slot: the call of what stands in it, in a forward traced with the slot filled.

    `gain` is the factor that the author's code puts behind a filled slot (NFNet: 2), else 1. `replaces`
    says that the slot is not empty: it holds channel attention that is to be swapped.
    """

    name: str
    view: View
    node: fx.Node
    gain: float
    replaces: bool = False


def _content(module: nn.Module, name: str) -> object:
    return module._modules.get(name, module.__dict__.get(name, _ABSENT))


def empty_slot(traces: Traces, view: View) -> Slot | None:
    """The empty slot of an owner that its forward calls once, if there is one.

    Of several, an `nn.Identity` goes before None, as it is called in any case; of several of a kind,
    the first identity (ByobNet's default) but the last None, which is the end of the branch
    (NFNet's default).
    """
    module = view.module
    content = {name: _content(module, name) for name in SLOT_NAMES}
    for node in view.nodes:
        empty = node.op == "call_module" and type(content.get(str(node.target))) is nn.Identity
        if empty and _usable(node) and _once(view, node):
            return Slot(str(node.target), view, node, 1.0)
    found: list[Slot] = []
    for name, value in content.items():
        if value is None:
            slot = _probe(traces, view, name)
            if slot is not None:
                found.append(slot)
    return max(found, key=lambda s: s.view.index[s.node], default=None)


def gate_slot(view: View, gates: Gates) -> Slot | None:
    """The owner's child that only gates its input, if there is one: attention that can be swapped."""
    for node in view.nodes:
        if node.op == "call_module" and node.target in view.module._modules and _usable(node):
            inner = gates.pure.get(node.meta["call"].module)
            if inner and _once(view, node):
                return Slot(str(node.target), view, node, 1.0, replaces=True)
    return None


def takes_activation(owner: type[nn.Module], slot: str) -> bool:
    """Whether the author hands the owner's activation on to what is put into `slot`.

    It is read from the constructor, where ``self.<slot>`` is assigned a call with ``act_layer=``.
    Authors differ: EfficientNet and CSPNet do, ResNet and ByobNet leave attention its ReLU.
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


def _once(view: View, node: fx.Node) -> bool:
    return sum(n.target == node.target for n in view.nodes if n.op == "call_module") == 1


def _usable(node: fx.Node) -> bool:
    return is_tensor(node) and len(shape(node)) >= 3 and len(node.args) == 1 and node.meta["val"].is_floating_point()


def _probe(traces: Traces, view: View, name: str) -> Slot | None:
    """Fill a None slot with a marker and see whether, and where, the author's code calls it."""
    module = view.module
    attributes, children = dict(module.__dict__), dict(module._modules)
    try:
        setattr(module, name, Marker())
        marked = View(own_graph(view.owner.call), traces)
    except TraceError:
        return None
    finally:
        module.__dict__.clear()
        module.__dict__.update(attributes)
        module._modules.clear()
        module._modules.update(children)
    calls = [n for n in marked.nodes if n.op == "call_module" and n.target == name]
    if len(calls) != 1 or not _usable(calls[0]):
        return None
    extra = len(marked.nodes) - len(view.nodes) - 1
    if extra == 0:
        return Slot(name, marked, calls[0], 1.0)
    users = list(calls[0].users)
    if extra == 1 and len(users) == 1 and users[0].target in MULS:
        factors = [a for a in users[0].args if isinstance(a, (int, float))]
        if len(factors) == 1 and factors[0] in (0.5, 1.0, 2.0, 4.0):  # powers of two undo exactly
            return Slot(name, marked, calls[0], float(factors[0]))
    return None
