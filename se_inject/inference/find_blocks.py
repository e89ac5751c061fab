"""The blocks of a model that compute their input times a gate, and what becomes of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

import torch
from torch import fx, nn

from ..capture.calls import Call
from ..dataflow.branches import branches
from ..dataflow.module_graph import ModuleGraph
from ..dataflow.ops import shape
from ..dataflow.value_flow import ValueFlow
from ..errors import Refusal
from ..find.attention import Gate, Gates, gate_of
from .affine import Maps
from .gate_layers import GateBuilder
from .merged_layers import MergedGate
from .report import OptimizedBlock
from .rewritable import Region, check_plain, check_rewritable
from .scaled_weights import calls_to_layer
from .upstream import Source, Upstream


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """A block that becomes a product with a gate.

    Attributes:
        call: Its call.
        view: The forward of its owner, which calls it.
        node: The call in that forward.
        axis: The channel axis there.
        gate: Computes the gate: merged layers, or the block's own operators.
        source: What the gate is computed from.
        region: The forwards that have to be one for that.
    """

    call: Call
    view: ModuleGraph
    node: fx.Node
    axis: int
    gate: MergedGate | Gate
    source: Source
    region: Region


def find_blocks(
    flow: ValueFlow, values: Mapping[str, torch.Tensor], injected: Collection[str]
) -> tuple[list[Block], list[OptimizedBlock]]:
    """The blocks to rewrite, in the order of their calls, and a report on each block, also those that stay as they are.

    Use it inside `on_meta`; the model is not changed.

    Args:
        flow: The values of the recorded run.
        values: The model's parameters and buffers, with their values.
        injected: The paths of the injected blocks. Other modules are blocks where they do nothing but gate their input.
    """
    finder = _Finder(flow, values)
    gating = {m for m, is_pure in Gates(flow.traces).pure.items() if is_pure}
    blocks: dict[Call, Block] = {}
    reports = []
    for call in flow.traces.root.walk():
        outer = call.parent
        while outer is not None and outer not in blocks:
            outer = outer.parent
        if outer is None and (call.module in gating or call.path in injected):
            try:
                blocks[call], report = finder.block(call)
            except Refusal as reason:
                report = OptimizedBlock(call.path, None, None, str(reason))
            reports.append(report)
    return list(blocks.values()), reports


class _Finder:
    """Decides what becomes of a block, by its call."""

    def __init__(self, flow: ValueFlow, values: Mapping[str, torch.Tensor]) -> None:
        self.flow = flow
        self.values = values
        maps = Maps(values)
        self.builder, self.upstream = GateBuilder(flow, maps), Upstream(flow, maps)

    def block(self, call: Call) -> tuple[Block, OptimizedBlock]:
        """A block to rewrite, and the report on it.

        Raises:
            Refusal: The block stays as it is.
        """
        view, node = self._only_call(call)
        x = node.all_input_nodes[0]
        start = self.flow.outward(view, x)[1]
        gate = gate_of(self.flow, call)
        if gate.moved:
            raise Refusal("it works in another layout than its input's")
        if gate.view.is_written_after(gate.node):
            raise Refusal("its gate is changed in place after it is computed")
        try:
            check_rewritable(self.flow, view.call, inlined=False)
        except Refusal as reason:
            raise Refusal(f"its owner is left alone: {reason}") from reason
        own = Source(view, x, gate.axis)
        try:
            layers = self.builder.layers_of(gate, start)
        except Refusal as reason:
            if gate.view.call is not call or self.flow.traces.view(call.module) is None:
                raise  # its own forward does not compute the gate, or cannot be split
            report = OptimizedBlock(call.path, self.upstream.path_of(own), None, str(reason))
            return Block(call, view, node, gate.axis, gate, own, self._with_layer(Region(view.call), view, node)), report
        squeeze = self.upstream.cheapest(own, layers)
        source = squeeze.source
        out = tuple(n if d == gate.axis else 1 for d, n in enumerate(shape(node)) if d > 0)
        merged = MergedGate(source.positions, squeeze.layers, out, self._weight_of(call))
        report = OptimizedBlock(
            call.path, self.upstream.path_of(source), source.channels if source.steps else None, squeeze.reason)
        return Block(call, view, node, gate.axis, merged, source, self._with_layer(squeeze.region, view, node)), report

    def _with_layer(self, region: Region, view: ModuleGraph, node: fx.Node) -> Region:
        """A region that also has the layer that alone reads a block's output, where there is one."""
        try:
            return Region(region.root, region.inlined.union(calls_to_layer(self.flow, view, node)))
        except Refusal:
            return region

    def _only_call(self, call: Call) -> tuple[ModuleGraph, fx.Node]:
        """The forward that calls a block, and the node there.

        Raises:
            Refusal: There are several calls, or the block does more than the trace shows, or takes in more than one tensor.
        """
        flow = self.flow
        if len(flow.traces.calls[call.module]) > 1:
            raise Refusal("it is called more than once")
        for c in call.walk():
            check_plain(flow, c.module, "it" if c is call else c.path)
        if call.writes:
            raise Refusal("it writes into its input")
        if branches(call.module, flow.traces.inside(call).forward):
            raise Refusal("it branches on sizes")
        if isinstance(call.module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            raise Refusal("it is a container")
        above = flow.caller(flow.traces.inside(call))
        if above is None:
            raise Refusal("it is the model itself")
        node = above[1]
        if len(node.all_input_nodes) != 1 or node.kwargs or len(node.args) != 1:
            raise Refusal("it takes in more than one tensor")
        return above

    def _weight_of(self, call: Call) -> torch.Tensor:
        """A parameter of the block, or of the model where the block has none: the gate gets its device and dtype."""
        name = next((name for name, _ in call.module.named_parameters(call.path)), None)
        return self.values[name or next(name for name, _ in self.flow.traces.root.module.named_parameters())]
