"""Take a constant factor on a tensor into the weights around it, exactly, or say why that cannot be.

One rule serves all layers: a factor on a value goes to what the value is made of, or to what is made of the value, through
operators that are homogeneous and keep elements apart, until it comes to parameters. Every module on the way, torch's
own layers too, is followed by its own trace. The factors of a value's elements are labels, see `labels.py`.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from ..capture.recording import Call
from ..dataflow.branches import other_branches
from ..dataflow.module_graph import ModuleGraph, TracedModel, spelled
from ..dataflow.ops import CONVS, argument, is_tensor, layer_arguments, of, shape
from ..dataflow.value_flow import ValueFlow
from ..errors import Refusal
from .element_labels import ONE, compact
from .operator_rules import Scaling, across, apart, before, beside, moved, operand, readers, times, vector


class Absorber:
    """Looks for the weights that take in factors of at least 0. Make and use it where the model is `abstract`.

    Args:
        model: The model that was recorded.
        traces: Its traces.
        compensate: Whether other readers of a scaled value may take in the inverse factor.
    """

    def __init__(self, model: nn.Module, traces: TracedModel, *, compensate: bool = False) -> None:
        self.traces = traces
        self.compensate = compensate
        self._names = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        self.flow = ValueFlow(traces)
        self._uses: dict[fx.Graph, Counter[tuple[str, str]]] = {}

    # what both directions use

    def view(self, call: Call) -> ModuleGraph:
        return self.traces.inside(call)

    def caller(self, view: ModuleGraph) -> tuple[ModuleGraph, fx.Node]:
        """The forward that calls `view`'s module, and the node that does."""
        above = self.flow.caller(view)
        if above is None:
            raise Refusal("the model's own input or output would change")
        return above

    def _check_ways(self, view: ModuleGraph, node: fx.Node, user: fx.Node) -> None:
        """That a value is read by the same on each way through a forward that branches on sizes.

        Raises:
            Refusal: It is not, or that cannot be known.
        """
        if not view.forward.decisions:
            return
        for pairs in other_branches(view):
            there = pairs.get(node)
            ours = {pairs.get(u) for u in readers(view, node)}
            if there is None or pairs.get(user) is None or None in ours or ours != {
                    u for u in there.users if not of(u).asks} or not (
                    self._is_single(there) and self._is_single(pairs[user])):
                raise Refusal(f"{type(view.module).__name__}.forward branches on sizes, and does something else there")

    def _parameter(self, view: ModuleGraph, node: fx.Node, labels: torch.Tensor, power: int) -> list[Scaling]:
        path, _, name = str(node.target).rpartition(".")
        module = view.module.get_submodule(path)
        p = module._parameters.get(name)
        key = f"{view.path}.{node.target}" if view.path else str(node.target)
        if p is None:
            raise Refusal(f"{key} is no parameter")
        if self._names[id(p)] > 1:
            raise Refusal(f"{key} is shared with another module")
        if len(self.traces.calls.get(module, ())) != (0 if path else 1):
            raise Refusal(f"{key} is used more than once")
        if not self._is_single(node) or tuple(p.shape) != labels.shape or self._reads(view.call.parent, key):
            raise Refusal(f"{key} is used more than once")
        return [Scaling(key, labels, power)]

    def _reads(self, call: Call | None, key: str) -> bool:
        """Whether a forward around a layer reads the layer's parameter itself."""
        while call is not None:
            with contextlib.suppress(Refusal):
                view = self.view(call)
                path = f"{view.path}." if view.path else ""
                if key.startswith(path) and self._used(view.forward.graph)["get_attr", key[len(path):]]:
                    return True
            call = call.parent
        return False

    def _used(self, graph: fx.Graph) -> Counter[tuple[str, str]]:
        """How often a forward calls each layer, and reads each parameter."""
        if graph not in self._uses:
            self._uses[graph] = Counter((n.op, str(n.target)) for n in graph.nodes)
        return self._uses[graph]

    def _is_single(self, node: fx.Node) -> bool:
        """Whether a layer is called, or a parameter read, by this node alone."""
        return node.op not in ("call_module", "get_attr") or self._used(node.graph)[node.op, str(node.target)] == 1

    # towards what a value is made of

    def up(self, view: ModuleGraph, node: Any, labels: torch.Tensor, user: fx.Node, power: int = 1) -> list[Scaling]:
        """The scalings that multiply the value of `node`, as `user` reads it, by the labelled factors.

        Raises:
            Refusal: There are none.
        """
        if not is_tensor(node):
            raise Refusal("it comes out of its module together with others")
        if bool((compact(labels) < 0).all()):
            return []
        self._check_ways(view, node, user)
        if node.op == "get_attr":
            return self._parameter(view, node, labels, power)
        labels, more = self._with_other_readers(view, node, labels, user, power)
        if node.op == "placeholder":
            parent, at = self.caller(view)
            arg = self.flow.bound(view.module, at).get(str(node.target))
            return more + self.up(parent, arg, labels, at, power)
        if node.op == "call_module":
            call = view.call_of(node)
            inside = self.view(call)
            return more + self.up(inside, inside.nodes[-1].args[0], labels, inside.nodes[-1], power)
        return more + self._up_through(view, node, labels, power)

    def _with_other_readers(
        self, view: ModuleGraph, node: fx.Node, labels: torch.Tensor, user: fx.Node, power: int
    ) -> tuple[torch.Tensor, list[Scaling]]:
        """The labels that serve all readers of a value, and what those take in that shall not see the factor."""
        more: list[Scaling] = []
        if list(user.all_input_nodes).count(node) != 1 or times(user, node) != 1:
            raise Refusal(f"{spelled(user)} reads its input twice")
        for other in readers(view, node):
            if other is user:
                continue
            both = beside(other, node, labels)
            if both is not None:
                labels = both
            elif self.compensate:
                more += self.into(view, other, node, labels, -power)
            else:
                raise Refusal(f"its input is also read by {spelled(other, view)}")
        return labels, more

    def _up_through(self, view: ModuleGraph, node: fx.Node, labels: torch.Tensor, power: int) -> list[Scaling]:
        op, first = of(node), argument(node, "input")
        if op.name in ("add", "addcmul"):
            return self._up_sum(view, node, labels, power)
        if op.name == "mul":
            return self._up_product(view, node, [a for a in node.args[:2] if is_tensor(a)], labels, power)
        if op.name == "div":
            if node.kwargs:
                raise Refusal(f"it does not pass {spelled(node)}")
            return self.up(view, first, operand(first, labels), node, power)
        if op.scales:
            return self.up(view, first, labels, node, power)
        dims = _mixed_axes(node)
        if dims is not None:
            if op.reduces and len(shape(node)) != len(shape(first)):
                for d in sorted(d % len(shape(first)) for d in ([dims] if isinstance(dims, int) else dims)):
                    labels = labels.unsqueeze(d)
            return self.up(view, first, across(labels, dims, shape(first), node), node, power)
        if op.normalizes:
            return self._up_norm(view, node, labels, power)
        if op.name == "linear" or op.name in CONVS:
            return self._up_conv(view, node, labels, power)
        return self._up_moved(view, node, labels, power)

    def _up_sum(self, view: ModuleGraph, node: fx.Node, labels: torch.Tensor, power: int) -> list[Scaling]:
        terms = [argument(node, "input"), argument(node, "other")]
        out: list[Scaling] = []
        if of(node).name == "addcmul":
            terms = [argument(node, "input")]
            factors = [a for a in node.args[1:3] if is_tensor(a)]
            out += self._up_product(view, node, factors, labels, power)
        terms = [t for t in terms if is_tensor(t) or t != 0]  # a sum that begins with 0
        if node.kwargs or not all(map(is_tensor, terms)):
            raise Refusal(f"a constant is added at {spelled(node)}")
        for t in terms:
            out += self.up(view, t, operand(t, labels), node, power)
        return out

    def _up_product(
        self, view: ModuleGraph, node: fx.Node, factors: list[Any], labels: torch.Tensor, power: int
    ) -> list[Scaling]:
        """One of the factors takes it all in: a parameter before an activation."""
        return self._first(*(
            lambda f=f: self.up(view, f, operand(f, labels), node, power)  # type: ignore[misc]
            for f in sorted(factors, key=view.moves)))

    @staticmethod
    def _first(*ways: Callable[[], list[Scaling]]) -> list[Scaling]:
        """The first way that there is; else the reason of the first."""
        reason: Refusal | None = None
        for way in ways:
            try:
                return way()
            except Refusal as error:
                reason = reason or error
        raise reason or Refusal("nothing there takes it in")

    def _up_norm(self, view: ModuleGraph, node: fx.Node, labels: torch.Tensor, power: int) -> list[Scaling]:
        weight, bias = argument(node, "weight"), argument(node, "bias")
        if weight is None:
            raise Refusal(f"{spelled(node, view)} has no weight")
        out: list[Scaling] = []
        for p in (weight, bias):
            if p is not None:
                own = labels if of(node).name in ("layer_norm", "rms_norm") else labels.movedim(1, -1)
                out += self.up(view, p, operand(p, own), node, power)
        return out

    def _up_conv(self, view: ModuleGraph, node: fx.Node, labels: torch.Tensor, power: int) -> list[Scaling]:
        x, weight, bias, _ = layer_arguments(node)
        if not is_tensor(weight):
            raise Refusal(f"{spelled(node, view)} has no weight")
        assert isinstance(weight, fx.Node) and isinstance(x, fx.Node)
        axis = -1 if of(node).name == "linear" else 1

        def rows() -> list[Scaling]:
            v = vector(labels, axis, node)
            own = v.view(-1, *[1] * (len(shape(weight)) - 1)).expand(shape(weight))
            out = self.up(view, weight, own, node, power)
            return out if bias is None else out + self.up(view, bias, v, node, power)

        def through() -> list[Scaling]:
            return self.up(view, x, apart(view, node, labels, shape(x)), node, power)

        return self._first(rows, through)

    def _up_moved(self, view: ModuleGraph, node: fx.Node, labels: torch.Tensor, power: int) -> list[Scaling]:
        """Through an operator that only moves elements, to all the values that it reads."""
        out: list[Scaling] = []
        for source in dict.fromkeys(node.all_input_nodes):
            value = source.meta["val"]
            if isinstance(value, torch.Tensor):
                own = before(node, source, [(node, labels)])
                out += self.up(view, source, own, node, power)
            elif view.carries_data(source):  # one of the parts of a split
                if len(source.all_input_nodes) != 1 or not is_tensor(source.args[0]):
                    raise Refusal(f"it comes out of {spelled(source, view)} together with others")
                whole = source.args[0]
                parts = [(n, labels if n is node else torch.full(shape(n), ONE, dtype=torch.float64))
                         for n in source.users if is_tensor(n)]
                if len(parts) != len(source.users):
                    raise Refusal(f"it comes out of {spelled(source, view)} together with others")
                out += self.up(view, whole, before(source, whole, parts), source, power)  # type: ignore[arg-type]
        return out

    # towards what is made of a value

    def down(self, view: ModuleGraph, node: fx.Node, labels: Any, power: int = 1) -> list[Scaling]:
        """The scalings that do to all readers of `node` what multiplying its value by the labelled factors would do.

        Raises:
            Refusal: There are none.
        """
        out: list[Scaling] = []
        for user in readers(view, node):
            out += self.into(view, user, node, labels, power)
        return out

    def into(self, view: ModuleGraph, user: fx.Node, node: fx.Node, labels: Any, power: int) -> list[Scaling]:
        """The same for one reader of `node`."""
        if not isinstance(labels, torch.Tensor):  # the parts of a split
            return self._down_moved(view, user, node, labels, power)
        if bool((compact(labels) < 0).all()):
            return []
        self._check_ways(view, node, user)
        if user.op == "output":
            if user.args[0] is not node:
                raise Refusal("it leaves its module together with others")
            parent, at = self.caller(view)
            return self.down(parent, at, labels, power)
        if user.op == "call_module":
            call = view.call_of(user)
            inside = self.view(call)
            names = [k for k, v in self.flow.bound(call.module, user).items() if v is node]
            inputs = [n for n in inside.nodes if n.op == "placeholder" and n.target in names]
            if len(names) != 1 or len(inputs) != 1:
                raise Refusal(f"{call.path} takes it in among others")
            return self.down(inside, inputs[0], labels, power)
        return self._into_operator(view, user, node, labels, power)

    def _into_operator(
        self, view: ModuleGraph, user: fx.Node, node: fx.Node, labels: torch.Tensor, power: int
    ) -> list[Scaling]:
        op = of(user)
        is_first = argument(user, "input") is node and times(user, node) == 1
        if op.name == "mul" and times(user, node) == 1:
            return self._into_product(view, user, node, labels, power)
        if op.name == "add" and not user.kwargs and 0 in [a for a in user.args if not isinstance(a, fx.Node)]:
            return self.down(view, user, labels, power)
        if op.name == "add":
            raise Refusal(f"it is added to something else at {spelled(user, view)}")
        if op.name == "div" and is_first and not user.kwargs:
            return self.down(view, user, labels.expand(shape(user)), power)
        if op.scales and op.name != "div" and is_first:
            return self.down(view, user, labels, power)
        dims = _mixed_axes(user)
        if dims is not None and is_first:
            return self.down(view, user, across(labels, dims, shape(user), user), power)
        if (op.name == "linear" or op.name in CONVS) and is_first:
            return self._into_conv(view, user, labels, power)
        return self._down_moved(view, user, node, labels, power)

    def _into_product(
        self, view: ModuleGraph, user: fx.Node, node: fx.Node, labels: torch.Tensor, power: int
    ) -> list[Scaling]:
        """A parameter takes it in (layer scale); else, with compensation, the other factor; else it goes on."""
        result = labels.expand(shape(user))
        factors = [a for a in user.args[:2] if isinstance(a, fx.Node) and is_tensor(a) and a is not node]

        def other() -> list[Scaling]:
            (factor,) = factors
            return self.up(view, factor, operand(factor, result), user, power)

        if not factors or (view.moves(factors[0]) and not self.compensate):
            return self.down(view, user, result, power)
        return self._first(other, lambda: self.down(view, user, result, power))

    def _into_conv(self, view: ModuleGraph, user: fx.Node, labels: torch.Tensor, power: int) -> list[Scaling]:
        _, weight, _, groups = layer_arguments(user)
        if not is_tensor(weight):
            raise Refusal(f"{spelled(user, view)} has no weight")
        assert isinstance(weight, fx.Node)

        def columns() -> list[Scaling]:
            v = vector(labels, -1 if of(user).name == "linear" else 1, user)
            rows, inputs, *kernel = shape(weight)
            own = v.view(groups, 1, inputs).expand(groups, rows // groups, inputs).reshape(
                rows, inputs, *[1] * len(kernel)).expand(shape(weight))
            return self.up(view, weight, own, user, power)

        def through() -> list[Scaling]:
            return self.down(view, user, apart(view, user, labels, shape(user)), power)

        return self._first(columns, through)

    def _down_moved(self, view: ModuleGraph, user: fx.Node, node: fx.Node, labels: Any, power: int) -> list[Scaling]:
        try:
            there = moved(user, {node: labels})
        except Refusal:
            raise Refusal(f"it does not pass {spelled(user, view)}") from None
        return self.down(view, user, there, power)


def _mixed_axes(node: fx.Node) -> Any:
    """The axes over which an operator combines elements, and apart from which it is homogeneous; None for other operators."""
    op = of(node)
    if op.pools:
        return range(2, len(shape(node)))
    return argument(node, "dim") if op.reduces else None
