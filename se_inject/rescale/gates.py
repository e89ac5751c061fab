"""The gates of a model's blocks, and the weights that take in what each gate multiplies by.

`fold` looks for the whole gate, which is constant, and `to_native` for the constant factor in it (`init="identity"`).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import fx, nn

from ..capture.example import Example, Inputs
from ..capture.forward import trace_forward
from ..capture.snapshot import restored
from ..dataflow.module_graph import ModuleGraph
from ..dataflow.ops import name_of, shape
from ..errors import Refusal, SEInjectError, TraceError
from ..find.attention import Gate, gate_of
from ..site import Site
from ..surgery.session import traced
from ..surgery.state import edits_of, injections_of
from .absorb import Absorber, Scaling
from .element_labels import filled, label_channels
from .gate_statistics import GateStatistics


@dataclasses.dataclass(eq=False)
class GatedBlock:
    """A block, and what `fold` and `gates` find out about it.

    Attributes:
        site: Where the block is.
        gate: Its gate; None if the block is not its input times a gate.
        scalings: The parameters that take in the mean gate, times `gain`.
        gain: The factor that the owner's forward applies only if the block is there, see `outer_gain`.
        reason: Why the block is kept; None if it is folded.
        statistics: Those of the gate.
    """

    site: Site
    gate: Gate | None = None
    scalings: tuple[Scaling, ...] = ()
    gain: float = 1.0
    reason: str | None = None
    statistics: GateStatistics = dataclasses.field(default_factory=GateStatistics)

    @property
    def factors(self) -> torch.Tensor:
        """What takes the place of the block: a factor for each channel (C,)."""
        return self.statistics.mean * self.gain

    def channel_axis(self, dims: int) -> int:
        """The axis of the channels in the block's input, which has `dims` axes."""
        return self.site.layout.index("C")


def find_blocks(model: nn.Module, inputs: Inputs) -> list[GatedBlock]:
    """All blocks in the order of their sites, each with the parameters that take in its gate, or the reason why none do.

    Raises:
        TraceError: The model does not take these inputs.
    """
    blocks = [GatedBlock(site) for injection in injections_of(model) for site in injection.sites]
    with traced(model, inputs) as t:
        absorber = Absorber(model, t)
        for b in blocks:
            try:
                _find_scalings(absorber, b, model.get_submodule(b.site.path))
            except Refusal as refusal:
                b.reason = str(refusal)
    return blocks


def find_blocks_for(what: str, model: nn.Module, first: Example, inputs: Inputs) -> list[GatedBlock]:
    """The blocks, found on inputs like those of the first batch, for the function `what`.

    Raises:
        SEInjectError: The model does not take them.
    """
    try:
        return find_blocks(model, first.on_meta() if isinstance(inputs, Example) else first.size)
    except TraceError as error:
        raise SEInjectError(
            f"{what}({type(model).__name__}): the model does not take the loader's images, of (C, H, W) = {first.size}: "
            f"{error}") from error


def reason_to_keep(what: str, b: GatedBlock, max_variation: float | None) -> str | None:
    """Why `fold` keeps a block whose gate has been measured; None if it can be folded.

    Raises:
        SEInjectError: The gate is not finite.
    """
    variation = b.statistics.variation
    if not b.statistics.is_finite:
        raise SEInjectError(
            f"{what}: the gate of {b.site.path!r} is NaN or infinite on these images; the model was not changed: check its "
            "weights and the normalization of the images")
    if b.reason is not None:
        return b.reason
    if max_variation is not None and not variation <= max_variation:
        return f"its gate varies by {variation:.3g}, more than {max_variation:g}"
    if bool((b.factors < 0).any()) and b.scalings:
        return "its mean gate is negative, and would not pass a ReLU"
    return None


def _find_scalings(absorber: Absorber, b: GatedBlock, module: nn.Module) -> None:
    """Find a block's gate, and the parameters that take the gate in.

    Raises:
        Refusal: There are none.
    """
    calls = absorber.traces.calls.get(module, [])
    if not calls:
        raise Refusal("it is not called on these images")
    b.gate = gate_of(absorber.flow, calls[0], shifts=True)
    if b.gate.shifted:
        raise Refusal("it adds a shift to the map, and a constant factor does not")
    if b.site.replaces:
        raise Refusal("it replaced the base's own attention, which would come back")
    view, node = only_call(absorber, module)
    b.gain = outer_gain(view, b.site.slot)
    b.scalings = tuple(absorb_gate(absorber, view, node, b.channel_axis(len(shape(node)))))


def only_call(absorber: Absorber, block: nn.Module) -> tuple[ModuleGraph, fx.Node]:
    """The forward of a block's owner, and the node in it that calls the block.

    Raises:
        Refusal: The block is called more than once, or its owner cannot be traced.
    """
    calls = absorber.traces.calls.get(block, ())
    if len(calls) != 1:
        raise Refusal("it is called more than once" if calls else "it is not called")
    return absorber.caller(absorber.traces.inside(calls[0]))


def absorb_gate(absorber: Absorber, view: ModuleGraph, node: fx.Node, axis: int) -> list[Scaling]:
    """The scalings that do what a constant gate does, by the number of the channel: before the block, else behind it.

    Args:
        absorber: The search.
        view: The forward of the block's owner.
        node: The node in it that calls the block.
        axis: The axis of the channels.

    Raises:
        Refusal: There are none; the reasons on both sides.
    """
    labels = label_channels(shape(node), axis)
    try:
        return absorber.before(view, node.args[0], labels, node)
    except Refusal as refusal:
        before = str(refusal)
    try:
        return absorber.behind(view, node, labels)
    except Refusal as refusal:
        raise Refusal(f"before it: {before}; behind it: {refusal}") from None


def outer_gain(view: ModuleGraph, slot: str) -> float:
    """The factor that the author's forward applies only if a slot is filled, such as NFNet's 2; otherwise 1.

    Raises:
        Refusal: The forward does something else, too, if the slot is empty.
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
    """The scalings that do what the constant factor of a gate does.

    Args:
        absorber: The search.
        module: The module whose forward multiplies by the factor, one of `gains`.
        gain: The factor.

    Raises:
        Refusal: There are none.
    """
    view = absorber.traces.inside(absorber.traces.calls[module][0])
    (product,) = [n for n in view.nodes if name_of(n) == "mul" and any(
        isinstance(a, float) and a == gain for a in n.args)]
    return absorber.behind(view, product, filled(0, ()).expand(shape(product)))
