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
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import fx, nn

from ..capture.calls import Call
from ..capture.graphs import counterparts, output_of
from ..capture.snapshot import restored
from ..capture.trail import is_trusted
from ..dataflow.branches import other_branches, trace_branches
from ..dataflow.module_graph import ModuleGraph, TracedModel, spelled
from ..dataflow.ops import is_tensor, name_of, of
from ..dataflow.value_flow import ValueFlow
from ..errors import Refusal
from ..private import DropoutNd
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
        shared: Names of parameters that must not be scaled, as other tensors are in their memory, see `in_shared_memory`.
    """

    def __init__(
        self, model: nn.Module, traces: TracedModel, *, compensate: bool = False, shared: Collection[str] = ()
    ) -> None:  # fmt: skip
        self.traces = traces
        self.compensate = compensate
        self.shared = shared
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
        """A forward that branches on sizes, or does more in train mode, must do the same with a value in each branch.

        Raises:
            Refusal: It does something else, or that is not known.
        """
        def same(pairs: dict[fx.Node, fx.Node]) -> bool:
            there, its_reader = pairs.get(node), pairs.get(reader)
            if there is None or its_reader is None or not _has_same_arguments(view, reader, its_reader, pairs):
                return False
            users = {u for u in there.users if not _asks(u)}
            return users == {pairs.get(r) for r in _readers(view, node)} and (
                self._is_single(there) and self._is_single(its_reader))

        name = type(view.module).__name__
        if not all(map(same, other_branches(view.module, view.forward))):
            raise Refusal(f"{name}.forward branches on sizes, and does something else there")
        if not all(map(same, _in_training(view))):
            raise Refusal(f"{name}.forward does something else in train mode")

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
        if self._names[id(p)] > 1 or key in self.shared:
            raise Refusal(f"{key} is shared with another module")
        calls = self.traces.calls
        if len(calls[view.module]) != 1 or (path and calls.get(module)):  # one whose parameter its parent reads is not called
            raise Refusal(f"{key} is used more than once")
        if tuple(p.shape) != labels.shape or not self._is_single(node) or self._is_used_again(view.call, key):
            raise Refusal(f"{key} is used more than once")
        return Scaling(key, labels, power)

    def _is_used_again(self, call: Call | None, key: str) -> bool:
        """Whether a forward around a parameter reads it itself, or uses its layer otherwise on a branch or in training."""
        inner = True
        while call is not None:
            with contextlib.suppress(Refusal):
                view = self.traces.inside(call)
                name = key.removeprefix(f"{view.path}." if view.path else "")
                uses = self._uses_of(view.forward.graph, name)
                if not inner and uses["get_attr", name]:
                    return True
                for pairs in (*other_branches(view.module, view.forward), *_in_training(view)):
                    if not pairs or self._uses_of(next(iter(pairs.values())).graph, name) - uses:
                        return True
            call, inner = call.parent, False
        return False

    def _uses_of(self, graph: fx.Graph, name: str) -> Counter[tuple[str, str]]:
        """How often a forward reads a parameter, and calls the layers that hold it."""
        return Counter({(op, target): n for (op, target), n in self._counts(graph).items() if (
            op == "get_attr" and target == name) or (op == "call_module" and name.startswith(f"{target}."))})

    def _is_single(self, node: fx.Node) -> bool:
        """Whether no other node calls the same layer, or reads the same parameter."""
        return node.op not in ("call_module", "get_attr") or self._counts(node.graph)[node.op, str(node.target)] == 1

    def _counts(self, graph: fx.Graph) -> Counter[tuple[str, str]]:
        """How often a forward calls each layer, and reads each parameter."""
        if graph not in self._uses:
            self._uses[graph] = Counter((n.op, str(n.target)) for n in graph.nodes)
        return self._uses[graph]


def in_shared_memory(model: nn.Module) -> set[str]:
    """The names of a model's parameters and buffers whose spans of memory overlap with others. Call it outside `on_meta`."""
    spans = sorted(
        (t.data_ptr(), sum((n - 1) * step for n, step in zip(t.shape, t.stride())) * t.element_size(), name)
        for name, t in (*model.named_parameters(), *model.named_buffers())
        if t.layout is torch.strided and t.numel() and t.data_ptr())
    found: set[str] = set()
    last, holder = -1, ""
    for begin, length, name in spans:
        if begin <= last:
            found |= {name, holder}
        if begin + length > last:
            last, holder = begin + length, name
    return found


def _in_training(view: ModuleGraph) -> list[dict[fx.Node, fx.Node]]:
    """Where a forward calls more layers in train mode, or returns more, such as a second head: its nodes there, by those in
    eval mode. An empty dict stands for a branch that cannot be traced."""
    return [] if is_trusted(view.module) else view.shared("in training", lambda: _traced_in_training(view))


def _traced_in_training(view: ModuleGraph) -> list[dict[fx.Node, fx.Node]]:
    module = view.module
    with restored([module]):
        module.__dict__["training"] = True
        try:
            found = trace_branches(module, view.forward.constants, reading=True, drawing=True)
        except Refusal:
            return [{}]

    def layers(graph: fx.Graph) -> Counter[str]:  # dropout passes a factor on
        return Counter(str(n.target) for n in graph.nodes if n.op == "call_module" and not isinstance(
            module.get_submodule(str(n.target)), DropoutNd))

    def has_more(graph: fx.Graph) -> bool:
        return bool(layers(graph) - layers(view.forward.graph)) or len(output_of(graph).all_input_nodes) > len(
            output_of(view.forward.graph).all_input_nodes)

    return [{} if b.graph is None else counterparts(view.forward.graph, b.graph)
            for b in found if not b.refused and (b.graph is None or has_more(b.graph))]


def _asks(node: fx.Node) -> bool:
    """Whether a node asks for a size or the like, and not for elements."""
    return of(node).asks and (name_of(node) != "getattr" or node.args[1] in ("shape", "ndim", "dtype", "device"))


def _has_same_arguments(view: ModuleGraph, a: fx.Node, b: fx.Node, pairs: dict[fx.Node, fx.Node]) -> bool:
    """Whether two nodes of the same operator have the same arguments, those that are computed from sizes alike.

    Args:
        view: The forward of `a`.
        a, b: The nodes.
        pairs: The nodes of another branch of the forward, that of `b`, by those of `a`'s.
    """
    def same(x: Any, y: Any) -> bool:
        if isinstance(x, fx.Node) and isinstance(y, fx.Node):
            return pairs.get(x) is y and (view.carries_data(x) or _has_same_arguments(view, x, y, pairs))
        if isinstance(x, (list, tuple)) and isinstance(y, (list, tuple)):
            return len(x) == len(y) and all(map(same, x, y))
        if isinstance(x, slice) and isinstance(y, slice):
            return same((x.start, x.stop, x.step), (y.start, y.stop, y.step))
        return type(x) is type(y) and bool(x == y)

    return (a.op, a.target) == (b.op, b.target) and same(a.args, b.args) and (
        a.kwargs.keys() == b.kwargs.keys() and all(same(a.kwargs[k], b.kwargs[k]) for k in a.kwargs))


def _readers(view: ModuleGraph, node: fx.Node) -> list[fx.Node]:
    """The nodes that use the elements of a value, and not merely its size.

    Raises:
        Refusal: There are several, and its memory is written in place: not all of them read the value itself.
    """
    found = view.readers(node)
    if len(found) > 1 and is_tensor(node) and view.is_written_after(node):
        raise Refusal(f"its tensor is changed in place, and read by {spelled(found[-1], view)}")
    return found
