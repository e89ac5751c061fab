"""Where a constant factor goes: the weights that take it in exactly, or the reason why there are none.

The search goes *before* a value, to what the value is computed from, or *behind* it, to what is computed from the value. It
passes operators by their rules, see `operator_rules`, until it comes to parameters. It enters each module by the module's own
trace, torch's layers included, so that one rule for each operator serves all layers. Elements of a value may have different
factors; `element_labels` says which.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx, nn

from ..capture.calls import Call
from ..dataflow.aliasing import is_written_after
from ..dataflow.branches import other_branches
from ..dataflow.module_graph import ModuleGraph, TracedModel, spelled
from ..dataflow.ops import is_tensor, of
from ..dataflow.value_flow import ValueFlow
from ..errors import Refusal
from .element_labels import compact, spare
from .operator_rules import Choice, Goal, choices_before, choices_behind, reads


@dataclasses.dataclass(frozen=True, eq=False)
class Scaling:
    """One parameter, and the factors to multiply it by.

    Attributes:
        key: The parameter's dotted name.
        labels: For each element of the parameter, the number of its factor; below 0 the factor is 1.
        power: 1, or -1 to divide by the factors.
    """

    key: str
    labels: torch.Tensor
    power: int

    def scale(self, values: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """The scaled values, as a new tensor of the same dtype."""
        powers = factors.cpu().double() ** self.power
        one = torch.ones((), dtype=powers.dtype)
        by = torch.where(self.labels >= 0, powers[self.labels.clamp(min=0).long()], one)
        return (values.cpu().double() * by).to(values.device, values.dtype)


class Absorber:
    """Looks for the weights that take in factors of at least 0. Make and use it inside `traced`.

    Args:
        model: The model that was traced.
        traces: Its traces.
        compensate: Whether the other readers of a scaled value may take in the inverse factor.
    """

    def __init__(self, model: nn.Module, traces: TracedModel, *, compensate: bool = False) -> None:
        self.traces = traces
        self.compensate = compensate
        self.flow = ValueFlow(traces)
        self._names = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        self._uses: dict[fx.Graph, Counter[tuple[str, str]]] = {}

    def caller(self, view: ModuleGraph) -> tuple[ModuleGraph, fx.Node]:
        """The forward that calls `view`'s module, and the node that does.

        Raises:
            Refusal: It is the model itself.
        """
        above = self.flow.caller(view)
        if above is None:
            raise Refusal("the model's own input or output would change")
        return above

    # the two directions

    def before(self, view: ModuleGraph, node: Any, labels: torch.Tensor, reader: fx.Node, power: int = 1) -> list[Scaling]:
        """The scalings that multiply a value, as one reader reads it.

        Args:
            view: The forward in which the value is computed.
            node: The value.
            labels: Those of the value's elements.
            reader: The node that reads the scaled value. The other readers must not see a difference.
            power: 1, or -1 to divide.

        Raises:
            Refusal: There are none.
        """
        if not is_tensor(node):
            raise Refusal("it comes out of its module together with others")
        if bool((compact(labels) < 0).all()):
            return []
        self._check_branches(view, node, reader)
        if node.op == "get_attr":
            return [self._parameter(view, node, labels, power)]
        labels, more = self._spare_other_readers(view, node, labels, reader, power)
        if node.op == "placeholder":
            parent, call = self.caller(view)
            given = self.flow.bound(view.module, call).get(str(node.target))
            return more + self.before(parent, given, labels, call, power)
        if node.op == "call_module":
            inside = self.traces.inside(view.call_of(node))
            result = inside.nodes[-1]
            return more + self.before(inside, result.args[0], labels, result, power)
        return more + self._reach_one(view, choices_before(view, node, labels), power)

    def behind(self, view: ModuleGraph, node: fx.Node, labels: Any, power: int = 1) -> list[Scaling]:
        """The scalings behind a value that have the effect of multiplying the value itself.

        Args:
            view: The forward in which the value is computed.
            node: The value.
            labels: Those of the value's elements; a list if the value is a list, such as the parts of a split.
            power: 1, or -1 to divide.

        Raises:
            Refusal: There are none.
        """
        return [s for reader in _readers(view, node) for s in self._behind_one(view, reader, node, labels, power)]

    def _behind_one(self, view: ModuleGraph, reader: fx.Node, node: fx.Node, labels: Any, power: int) -> list[Scaling]:
        """The same for one reader of the value."""
        if isinstance(labels, torch.Tensor):  # a list has to be taken apart by an operator
            if bool((compact(labels) < 0).all()):
                return []
            self._check_branches(view, node, reader)
            if reader.op == "output":
                if reader.args[0] is not node:
                    raise Refusal("it leaves its module together with others")
                return self.behind(*self.caller(view), labels, power)
            if reader.op == "call_module":
                call = view.call_of(reader)
                inside = self.traces.inside(call)
                names = [name for name, value in self.flow.bound(call.module, reader).items() if value is node]
                inputs = [n for n in inside.nodes if n.op == "placeholder" and n.target in names]
                if len(names) != 1 or len(inputs) != 1:
                    raise Refusal(f"{call.path} takes it in among others")
                return self.behind(inside, inputs[0], labels, power)
        return self._reach_one(view, choices_behind(view, reader, node, labels, self.compensate), power)

    def _spare_other_readers(
        self, view: ModuleGraph, node: fx.Node, labels: torch.Tensor, reader: fx.Node, power: int
    ) -> tuple[torch.Tensor, list[Scaling]]:
        """The labels that satisfy all readers of a value, and scalings that divide what the others make of it."""
        if reads(reader, node) != 1:
            raise Refusal(f"{spelled(reader)} reads its input twice")
        more: list[Scaling] = []
        for other in _readers(view, node):
            if other is reader:
                continue
            spared = spare(other, node, labels)
            if spared is not None:
                labels = spared
            elif self.compensate:
                more += self._behind_one(view, other, node, labels, -power)
            else:
                raise Refusal(f"its input is also read by {spelled(other, view)}")
        return labels, more

    def _reach_one(self, view: ModuleGraph, choices: Iterable[Choice], power: int) -> list[Scaling]:
        """The scalings for the first choice whose goals can all be reached.

        Raises:
            Refusal: There is no such choice; the reason is that of the first.
        """
        reason: Refusal | None = None
        for choice in choices:
            try:
                return [s for goal in choice() for s in self._reach(view, goal, power)]
            except Refusal as error:
                reason = reason or error
        raise reason or Refusal("nothing there takes it in")

    def _reach(self, view: ModuleGraph, goal: Goal, power: int) -> list[Scaling]:
        if goal.reader is None:
            return self.behind(view, goal.node, goal.labels, power)
        return self.before(view, goal.node, goal.labels, goal.reader, power)

    def _check_branches(self, view: ModuleGraph, node: fx.Node, reader: fx.Node) -> None:
        """A forward that branches on sizes must do the same with a value in each branch.

        Raises:
            Refusal: It does something else, or that is not known.
        """
        def same(pairs: dict[fx.Node, fx.Node]) -> bool:
            there, its_reader = pairs.get(node), pairs.get(reader)
            if there is None or its_reader is None:
                return False
            users = {u for u in there.users if not of(u).asks}
            return users == {pairs.get(r) for r in _readers(view, node)} and (
                self._is_single(there) and self._is_single(its_reader))

        if not all(map(same, other_branches(view.module, view.forward))):
            raise Refusal(f"{type(view.module).__name__}.forward branches on sizes, and does something else there")

    # parameters

    def _parameter(self, view: ModuleGraph, node: fx.Node, labels: torch.Tensor, power: int) -> Scaling:
        """The scaling of a parameter that only this node reads.

        Raises:
            Refusal: It is no parameter, or something else uses it.
        """
        path, _, name = str(node.target).rpartition(".")
        module = view.module.get_submodule(path)
        p = module._parameters.get(name)
        key = f"{view.path}.{node.target}" if view.path else str(node.target)
        if p is None:
            raise Refusal(f"{key} is no parameter")
        if self._names[id(p)] > 1:
            raise Refusal(f"{key} is shared with another module")
        calls = len(self.traces.calls.get(module, ()))  # a layer whose parameter its parent reads is not called itself
        if calls != (0 if path else 1) or not self._is_single(node) or tuple(p.shape) != labels.shape or (
                self._is_read_above(view.call.parent, key)):
            raise Refusal(f"{key} is used more than once")
        return Scaling(key, labels, power)

    def _is_read_above(self, call: Call | None, key: str) -> bool:
        """Whether a forward around a layer reads the layer's parameter itself."""
        while call is not None:
            with contextlib.suppress(Refusal):
                view = self.traces.inside(call)
                prefix = f"{view.path}." if view.path else ""
                if key.startswith(prefix) and self._count(view.forward.graph, "get_attr", key[len(prefix):]):
                    return True
            call = call.parent
        return False

    def _is_single(self, node: fx.Node) -> bool:
        """Whether no other node calls the same layer, or reads the same parameter."""
        return node.op not in ("call_module", "get_attr") or self._count(node.graph, node.op, str(node.target)) == 1

    def _count(self, graph: fx.Graph, op: str, target: str) -> int:
        """How often a forward calls a layer, or reads a parameter."""
        if graph not in self._uses:
            self._uses[graph] = Counter((n.op, str(n.target)) for n in graph.nodes)
        return self._uses[graph][op, target]


def _readers(view: ModuleGraph, node: fx.Node) -> list[fx.Node]:
    """The nodes that use the elements of a value, and not merely its size.

    Raises:
        Refusal: There are several, and its memory is written in place: not all of them read the value itself.
    """
    found = view.readers(node)
    if len(found) > 1 and is_tensor(node) and is_written_after(view, node):
        raise Refusal(f"its tensor is changed in place, and read by {spelled(found[-1], view)}")
    return found
