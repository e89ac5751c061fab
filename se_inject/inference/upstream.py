"""A tensor upstream of a block's input that is cheaper to squeeze, and the map from its mean to the mean of that input.

A mean over positions commutes with a linear map that is the same at all positions. So from the block's input the search goes
back through 1x1 convolutions, norms, linear layers, scales, shifts and changes of layout, until an operator is none of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from torch import fx

from ..capture.channels import batch_is_first, channel_axis
from ..dataflow.aliasing import written_between
from ..dataflow.module_graph import ModuleGraph, spelled
from ..dataflow.ops import CONVS, argument, is_tensor, of, shape
from ..dataflow.value_flow import ValueFlow
from ..errors import Refusal
from .affine import Affine, Maps, is_pointwise
from .merged_layers import Layer
from .rewritable import Region, common_region


@dataclasses.dataclass(eq=False)
class Source:
    """A tensor to squeeze for a block: the value of `node` in the forward `view`, with its channels along `axis`.

    `steps` make the maps from its mean to the mean of the block's input, the last map first; that input has none.
    """

    view: ModuleGraph
    node: fx.Node
    axis: int
    steps: tuple[Callable[[], Affine], ...] = ()

    @property
    def channels(self) -> int:
        return shape(self.node)[self.axis]

    @property
    def elements(self) -> int:
        """Elements to read for one image."""
        return math.prod(shape(self.node)[1:])

    @property
    def positions(self) -> tuple[int, ...]:
        """The axes to take the mean over."""
        return tuple(d for d in range(1, len(shape(self.node))) if d != self.axis)


@dataclasses.dataclass(frozen=True, eq=False)
class Squeeze:
    """Where a block's mean is taken.

    Attributes:
        source: The tensor.
        region: The forwards to inline, so that one forward has both the source and the block.
        layers: From the source's mean to the gate.
        reason: Why the source is the block's input; None where it is another.
    """

    source: Source
    region: Region
    layers: list[Layer]
    reason: str | None


class Upstream:
    """Looks for cheaper sources. Use it inside `on_meta`."""

    def __init__(self, flow: ValueFlow, maps: Maps) -> None:
        self.flow = flow
        self.maps = maps

    def cheapest(self, own: Source, layers: list[Layer]) -> Squeeze:
        """The squeeze that reads the fewest elements: those of the source and of the merged first layer.

        Args:
            own: The block's input.
            layers: From the mean of `own` to the gate.

        Raises:
            Refusal: The values before the block cannot be followed.
        """
        def stay(reason: str) -> Squeeze:
            return Squeeze(own, Region(own.view.call), layers, reason)

        sources, end = self._sources(own)
        first = layers[0] if layers else None
        if not isinstance(first, Affine):
            return stay("its first layer is no linear layer over channels")
        width = first.bias.numel()
        best = min(sources, key=lambda s: s.elements + s.channels * width)
        if not best.steps:
            return stay(f"no tensor before it is cheaper; {end}" if len(sources) > 1 else end)
        try:
            region = common_region(self.flow, own.view.call, best.view.call)
        except Refusal as reason:
            return stay(f"the cheaper tensor is in another forward: {reason}")
        for step in best.steps:
            first = first.after(step())
        return Squeeze(best, region, [first, *layers[1:]], None)

    def path_of(self, source: Source) -> str:
        """A source for the report: the path of the module that returns it, or else the name of the value."""
        view, node = source.view, source.node
        while node.op == "call_module" and self.flow.passes(view.call_of(node)) and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        if node.op == "call_module":
            return f"{view.path}.{node.target}" if view.path else str(node.target)
        return f"{node.name} in {view.path or type(view.module).__name__}"

    def _sources(self, own: Source) -> tuple[list[Source], str]:
        """The tensors that can be squeezed for `own`, itself first, and why there are no more.

        A tensor that is written in place between its operator and the block is none of them, but for `own`, which is squeezed
        where the block is called.
        """
        found = [Source(*self.flow.outward(own.view, own.node), own.axis)]
        end = found[0].view.call
        while True:
            last = found[-1]
            view, node = self.flow.origin(last.view, last.node)
            if written_between(self.flow, view, node, end):
                return found[:-1] or found, f"{spelled(last.node, last.view)} is changed in place later"
            try:
                x, axis, step = self._step(view, node, last.axis)
            except Refusal as reason:
                return found, str(reason)
            found.append(Source(*self.flow.outward(view, x), axis, last.steps if step is None else (*last.steps, step)))

    def _step(self, view: ModuleGraph, node: fx.Node, axis: int) -> tuple[fx.Node, int, Callable[[], Affine] | None]:
        """One operator back: its input, the input's channel axis, and what makes the map, None for the identity.

        Raises:
            Refusal: The operator does not map the channels of each position alike and linearly.
        """
        op, x = of(node), argument(node, "input")
        if is_tensor(node) and is_tensor(x):
            if op.name == "linear" or op.name in CONVS:
                if is_pointwise(view, node) and axis == (len(shape(node)) - 1 if op.name == "linear" else 1):
                    return x, axis, lambda: self.maps.layer(view, node)
            elif op.name == "batch_norm" and axis == 1 and not argument(node, "training", False):
                return x, 1, lambda: self.maps.norm(view, node)
            elif op.drops and not argument(node, "training", True):
                return x, axis, None
            elif (op.views or op.casts) and (at := _axis_before(node, x, axis)) is not None:
                return x, at, None
        if (operands := _constant_operand(view, node, axis)) is not None:
            moving, k = operands
            return moving, axis, lambda: self.maps.constant(view, node, k, axis)
        raise Refusal(f"{spelled(node, view)}{f' in {view.path}' if view.path else ''} is not linear over channels alone")


def _constant_operand(view: ModuleGraph, node: fx.Node, axis: int) -> tuple[fx.Node, Any] | None:
    """The activation and the constant of a product or sum; None for other nodes.

    The constant is a number, or a tensor that differs between channels alone.
    """
    if of(node).name not in ("mul", "add") or len(node.args) != 2 or node.kwargs or not is_tensor(node):
        return None
    rank = len(shape(node))
    for x, k in (node.args, node.args[::-1]):
        if not isinstance(x, fx.Node) or not is_tensor(x) or not view.moves(x) or shape(x) != shape(node):
            continue
        if isinstance(k, (int, float)):
            return x, k
        if isinstance(k, fx.Node) and is_tensor(k) and not view.moves(k) and all(
                n == 1 for d, n in enumerate(shape(k), rank - len(shape(k))) if d != axis):
            return x, k
    return None


def _axis_before(node: fx.Node, x: fx.Node, axis: int) -> int | None:
    """The channel axis of `x`, where `node` has the elements of `x` in another layout; None where channels or dtype change."""
    t, s = node.meta["val"], x.meta["val"]
    at = channel_axis(s)
    stays = at is not None and t.dtype == s.dtype and channel_axis(t) == axis and t.numel() == s.numel() and (
        t.shape[axis] == s.shape[at] and batch_is_first(t) and batch_is_first(s) and t.shape[0] == s.shape[0])
    return at if stays else None
