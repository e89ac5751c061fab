"""Which weights take in a block's gate, and what the gate is; used by `fold` and `to_native`."""

from __future__ import annotations

import dataclasses

import torch
from torch import fx, nn

from ..capture.forward import trace_forward
from ..capture.snapshot import restored
from ..dataflow.module_graph import ModuleGraph
from ..dataflow.ops import name_of, shape
from ..errors import Refusal
from ..surgery.state import edits_of
from .absorb import Absorber
from .element_labels import spread
from .operator_rules import Scaling


@dataclasses.dataclass(frozen=True, eq=False)
class Around:
    """The call of a block in its owner's forward, and the axis of its channels."""

    view: ModuleGraph
    node: fx.Node
    channels: int
    axis: int


def around(absorber: Absorber, block: nn.Module, layout: str) -> Around:
    """Where a block is called.

    Raises:
        Refusal: It is called more than once, or its owner cannot be traced.
    """
    calls = absorber.traces.calls.get(block, ())
    if len(calls) != 1:
        raise Refusal("it is called more than once" if calls else "it is not called")
    view, node = absorber.caller(absorber.view(calls[0]))
    dims = shape(node)
    axis = 1 if layout == "NCHW" else len(dims) - 1
    return Around(view, node, dims[axis], axis)


def absorb_gate(absorber: Absorber, at: Around) -> list[Scaling]:
    """The scalings that do what a constant gate does, by the number of the channel: before the block, else behind it.

    Raises:
        Refusal: There are none; the reasons of both.
    """
    labels = spread(at.channels, at.axis, shape(at.node))
    try:
        return absorber.up(at.view, at.node.args[0], labels, at.node)
    except Refusal as error:
        before = str(error)
    try:
        return absorber.down(at.view, at.node, labels)
    except Refusal as error:
        raise Refusal(f"before it: {before}; behind it: {error}") from None


def outer_gain(view: ModuleGraph, slot: str) -> float:
    """The factor that the author's forward puts behind a slot only when it is filled (NFNet's 2).

    Raises:
        Refusal: Without the block the forward does something else.
    """
    edits = edits_of(view.module)
    if edits is None or edits.kind != "fill" or edits.original is not None:
        return 1.0
    module = view.module
    decisions = iter(view.forward.decisions)
    with restored([module]):
        module.__dict__["_modules"] = {k: m for k, m in module._modules.items() if k != slot}
        if edits.original_registered:
            module._modules[slot] = None
        else:
            module.__dict__[slot] = None
        try:
            empty = trace_forward(module, view.forward.constants, lambda _: next(decisions))
        except (Refusal, StopIteration) as error:
            raise Refusal(f"without it, its owner cannot be traced: {error}") from None
    extra = len(view.nodes) - len(empty.nodes) - 1
    if extra == 0:
        return 1.0
    (call,) = [n for n in view.nodes if n.op == "call_module" and n.target == slot]
    factors = [a for u in call.users if name_of(u) == "mul" for a in u.args if isinstance(a, (int, float))]
    if extra == 1 and len(call.users) == 1 and len(factors) == 1:
        return float(factors[0])
    raise Refusal("without it, the forward of its owner does something else")


def absorb_gain(absorber: Absorber, module: nn.Module, gain: float) -> list[Scaling]:
    """The scalings that do what the factor in `module`, one of `gains`, does.

    Raises:
        Refusal: There are none.
    """
    view = absorber.view(absorber.traces.calls[module][0])
    (node,) = [n for n in view.nodes if name_of(n) == "mul" and any(
        isinstance(a, float) and a == gain for a in n.args)]
    return absorber.down(view, node, torch.zeros((), dtype=torch.float64).expand(shape(node)))
