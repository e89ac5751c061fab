"""The gates of a model's blocks, and the weights that take in what each gate multiplies by.

`fold` looks for the whole gate, which is constant, and `to_native` for the constant factor in it (`init="identity"`).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import fx, nn

from ..capture.calls import Call
from ..capture.example import Example, Inputs
from ..capture.forward import trace_forward
from ..capture.snapshot import restored
from ..dataflow.module_graph import ModuleGraph, spelled
from ..dataflow.ops import argument, name_of, shape
from ..errors import Refusal, SEInjectError, TraceError
from ..find.attention import Gate, gate_of
from ..site import Site
from ..surgery.session import traced
from ..surgery.state import edits_of, injections_of
from .absorb import Absorber, Scaling, in_shared_memory
from .element_labels import along, filled, label_channels, moved
from .gate_statistics import GateStatistics


@dataclasses.dataclass(eq=False)
class GatedBlock:
    """A block, and what `fold` and `gates` find out about it.

    Attributes:
        site: Where the block is.
        gate: Its gate; None if the block is not its input times a gate.
        scalings: The parameters that take in the mean gate, times `gain`.
        bias: The parameter that takes in the mean shift, times `gain`; None if the block has no shift.
        gain: The factor that the owner's forward applies only if the block is there, see `outer_gain`.
        reason: Why the block is kept; None if it is folded.
        statistics: Those of the gate.
        shift_statistics: Those of the shift.
    """

    site: Site
    gate: Gate | None = None
    scalings: tuple[Scaling, ...] = ()
    bias: str | None = None
    gain: float = 1.0
    reason: str | None = None
    statistics: GateStatistics = dataclasses.field(default_factory=GateStatistics)
    shift_statistics: GateStatistics = dataclasses.field(default_factory=GateStatistics)

    @property
    def factors(self) -> torch.Tensor:
        """What takes the place of the block: a factor for each channel (C,)."""
        return self.statistics.mean * self.gain

    @property
    def terms(self) -> torch.Tensor:
        """What is added to the bias in the place of the block, for each channel (C,)."""
        return self.shift_statistics.mean * self.gain

    @property
    def variation(self) -> float:
        """How much the gate varies from image to image, or the shift where that varies more."""
        gate, shift = self.statistics.variation, self.shift_statistics.relative_to_all
        return max(gate, shift) if self.bias is not None else gate

    def measured(self) -> list[tuple[Gate, GateStatistics]]:
        """The gate and the shift, each with its statistics."""
        if self.gate is None:
            return []
        found = [(self.gate, self.statistics)]
        if self.gate.shift is not None:
            found.append((dataclasses.replace(self.gate, node=self.gate.shift), self.shift_statistics))
        return found

    def channel_axis(self, dims: int) -> int:
        """The axis of the channels in the block's input, which has `dims` axes."""
        return self.site.layout.index("C")


def find_blocks(model: nn.Module, inputs: Inputs) -> list[GatedBlock]:
    """All blocks in the order of their sites, each with the parameters that take in its gate, or the reason why none do.

    Raises:
        TraceError: The model does not take these inputs.
    """
    blocks = [GatedBlock(site) for injection in injections_of(model) for site in injection.sites]
    shared = in_shared_memory(model)
    with traced(model, inputs) as t:
        absorber = Absorber(model, t, shared=shared)
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
    variation = b.variation
    if not (b.statistics.is_finite and b.shift_statistics.is_finite):
        raise SEInjectError(
            f"{what}: the gate of {b.site.path!r} is NaN or infinite on these images; the model was not changed: check its "
            "weights and the normalization of the images")
    if b.reason is not None:
        return b.reason
    if max_variation is not None and not variation <= max_variation:
        return f"its {'gate' if b.bias is None else 'gate or shift'} varies by {variation:.3g}, more than {max_variation:g}"
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
    gate = gate_of(absorber.flow, calls[0], shifts=True)
    _check_channels(absorber, b, gate, calls[0])
    b.gate = gate
    if b.gate.shifted and b.gate.shift is None:
        raise Refusal("it adds a shift in a form that no bias takes in")
    if b.site.replaces:
        raise Refusal("it replaced the base's own attention, which would come back")
    view, node = only_call(absorber, module)
    b.gain = outer_gain(view, b.site.slot)
    axis = b.channel_axis(len(shape(node)))
    if b.gate.shift is None:
        b.scalings = tuple(absorb_gate(absorber, view, node, axis))
    else:
        b.scalings, b.bias = absorb_shift(absorber, view, node, axis)


def _check_channels(absorber: Absorber, b: GatedBlock, gate: Gate, call: Call) -> None:
    """Follow the channels of a block's input to where the gate multiplies it.

    Raises:
        Refusal: The gate has not one factor for each channel, in their order.
    """
    def labels(view: ModuleGraph, node: fx.Node) -> torch.Tensor:
        if node.op == "placeholder":
            if view.call is call:
                return label_channels(shape(node), b.channel_axis(len(shape(node))))
            above, caller = absorber.caller(view)
            return labels(above, absorber.flow.bound(view.module, caller)[str(node.target)])
        source = argument(node, "input")
        given = labels(view, source)
        if name_of(node).startswith("view"):  # labels are expanded, and the input is not
            given = given.contiguous()
        out: torch.Tensor = moved(node, {source: given})
        return out

    found = along(labels(gate.view, gate.input), [gate.axis])
    if found is None or not torch.equal(found.flatten(), torch.arange(b.site.channels, dtype=found.dtype)):
        raise Refusal("its gate is not one factor for each channel")


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


def absorb_shift(absorber: Absorber, view: ModuleGraph, node: fx.Node, axis: int) -> tuple[tuple[Scaling, ...], str]:
    """The scalings before a block that do what its constant gate does, and the bias that takes in its shift.

    That is the bias of the layer which computes the block's input, where each of the bias's elements is scaled by the factor
    of its own channel: then nothing but changes of layout is between them, and a sum commutes with those.

    Raises:
        Refusal: There are none.
    """
    labels = label_channels(shape(node), axis)
    try:
        scalings = absorber.before(view, node.args[0], labels, node)
    except Refusal as refusal:
        raise Refusal(f"its shift goes into the bias of the layer before it: {refusal}") from None
    x = node.args[0]
    assert isinstance(x, fx.Node)
    inside, layer = absorber.flow.unmoved(view, x)
    bias = argument(layer, "bias")
    if not isinstance(bias, fx.Node) or bias.op != "get_attr":
        raise Refusal(f"its shift needs a bias, and {spelled(layer, inside)} before it has none")
    key = f"{inside.path}.{bias.target}" if inside.path else str(bias.target)
    channels = torch.arange(shape(node)[axis], dtype=torch.float64)
    if not any(s.key == key and s.power == 1 and torch.equal(s.labels, channels) for s in scalings):
        raise Refusal(f"its shift needs a bias for each channel, and {key} is none")
    return tuple(scalings), key


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
