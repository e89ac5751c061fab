"""The source of a value, across the forwards of the modules that pass it on."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

from torch import fx, nn

from ..capture.calls import Call
from ..errors import Refusal
from . import ops
from .branches import branches, other_branches
from .module_graph import ModuleGraph, TracedModel


class ValueFlow:
    """Follows values between the traced forwards of one recorded run.

    Args:
        traces: The traced model.
        barriers: Modules whose hooks may see or change their inputs and outputs. Where given, a value is followed neither
            into a call of one of them nor into a forward that branches on sizes.
    """

    def __init__(self, traces: TracedModel, barriers: Collection[nn.Module] | None = None) -> None:
        self.traces = traces
        self.barriers = barriers
        self._keeps: dict[Call, bool] = {}

    def caller(self, view: ModuleGraph) -> tuple[ModuleGraph, fx.Node] | None:
        """The forward that calls `view`'s module, and the node that does; None for the model itself.

        Raises:
            Refusal: fx cannot follow that forward.
        """
        if view.call.parent is None:
            return None
        parent = self.traces.inside(view.call.parent)
        return parent, parent.node_of[view.call]

    @staticmethod
    def bound(module: nn.Module, node: fx.Node) -> Mapping[str, Any]:
        """The arguments of a call of `module`, by parameter name."""
        return inspect.signature(type(module).forward).bind(module, *node.args, **node.kwargs).arguments

    def outward(self, view: ModuleGraph, node: fx.Node) -> tuple[ModuleGraph, fx.Node]:
        """The same value in the outermost forward that has it: an input of a module is a value of its caller."""
        while node.op == "placeholder":
            above = self.caller(view)
            given = None if above is None else self.bound(view.module, above[1]).get(str(node.target))
            if above is None or not isinstance(given, fx.Node):
                break
            view, node = above[0], given
        return view, node

    def origin(self, view: ModuleGraph, node: fx.Node) -> tuple[ModuleGraph, fx.Node]:
        """The operator that computes a value, in whichever forward it stands; or the model's input, or a call that cannot be
        traced."""
        while True:
            view, node = self.outward(view, node)
            if node.op != "call_module":
                return view, node
            call = view.call_of(node)
            if self.passes(call) and isinstance(node.args[0], fx.Node):
                node = node.args[0]
                continue
            try:
                inside = self.traces.inside(call)
            except Refusal:
                return view, node
            if self.barriers is not None and (call.module in self.barriers or branches(inside.module, inside.forward)):
                return view, node
            result = inside.nodes[-1].args[0]
            if not isinstance(result, fx.Node):
                return view, node
            view, node = inside, result

    def unmoved(self, view: ModuleGraph, node: fx.Node, computed: bool = True) -> tuple[ModuleGraph, fx.Node]:
        """The `origin` of a value, through changes of layout too; where it is not `computed`, as far as `outward` goes."""
        while True:
            view, node = self.origin(view, node) if computed else self.outward(view, node)
            source = ops.argument(node, "input") if ops.of(node).views else None
            if not isinstance(source, fx.Node):
                return view, node
            node = source

    def passes(self, call: Call) -> bool:
        """Whether a call returns its input at any size: an identity, or in eval mode dropout and drop path."""
        if not call.passes:
            return False
        try:
            if self.barriers is None:
                return not other_branches(call.module, self.traces.inside(call).forward)
            return not any(c.module in self.barriers or branches(c.module, self.traces.inside(c).forward) for c in call.walk())
        except Refusal:
            return False

    def keeps(self, call: Call) -> bool:
        """Whether something may keep the inputs or the output of a call: hooks, or a forward that sets attributes or cannot be
        traced."""
        if call not in self._keeps:
            module = call.module
            self._keeps[call] = module in (self.barriers or ()) or (
                self.traces.view(module) is None and module in self.traces.failures) or any(map(self.keeps, call.children))
        return self._keeps[call]
