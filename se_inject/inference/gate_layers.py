"""What is left of a squeeze-and-excitation block for inference: the gate, computed from the mean of some tensor."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from ..capture.channels import batch_is_first, channel_axis
from ..capture.graphs import compute
from ..capture.meta_ops import storage
from ..capture.recording import Call
from ..dataflow.aliasing import storages
from ..dataflow.module_graph import ModuleGraph, spelled
from ..dataflow.ops import CONVS, argument, is_tensor, layer_arguments, name_of, of, products, shape
from ..dataflow.value_flow import ValueFlow
from ..errors import Refusal
from .merged_layers import Affine, Layer
from .upstream import Source

_IN_PLACE = ("relu", "sigmoid")  # activations with a method that works in place


def _is_mean(node: fx.Node) -> bool:
    """Whether an operator takes a mean over axes, or pools a map to a given size."""
    return of(node).reduces == "mean" or name_of(node).startswith("adaptive_avg_pool")


class GateBuilder:
    """Makes excitations of blocks. Use it inside `abstract`; `values` gives the tensors as they are outside."""

    def __init__(self, flow: ValueFlow, values: Mapping[str, torch.Tensor]) -> None:
        self.flow = flow
        self.values = values

    # the block

    def layers_of(self, view: ModuleGraph, gate: fx.Node, start: fx.Node, axis: int) -> list[Layer]:
        """The layers from the mean of `start`, the block's input, to its gate; adjoining linear ones are one.

        `axis` is that of the channels.

        Raises:
            Refusal: The gate is computed in another way.
        """
        found: list[Layer] = []
        at: tuple[ModuleGraph, fx.Node] = view, gate
        while True:
            above, node = self._unmoved(*at)
            if node.op == "placeholder":
                raise Refusal("its gate is not made from the mean of its input alone")
            if _is_mean(node):
                self._check_mean(above, node, start, axis)
                return found[::-1]
            affine = self._vector_step(above, node)
            if affine is not None:
                x, step = affine
                if found and isinstance(found[-1], Affine):
                    found[-1] = found[-1].behind(step)
                else:
                    found.append(step)
                at = above, x
                continue
            scaled = self._scalar(above, node)
            if scaled is not None and not found:  # it goes with the product
                found.append(scaled[1])
                at = above, scaled[0]
                continue
            if name_of(node) in _IN_PLACE and list(node.all_input_nodes) == [node.args[0]]:
                found.append(f"{name_of(node)}_")
                at = above, node.args[0]  # type: ignore[assignment]
                continue
            module = above.module
            inputs = [n for n in above.nodes if n.op == "placeholder" and is_tensor(n)]
            if len(inputs) != 1 or not _is_elementwise(above):
                raise Refusal(f"{spelled(node, above)} is neither a linear layer nor an activation")
            outside = self.flow.outward(above, inputs[0])
            if outside[0] is above:
                raise Refusal(f"{spelled(node, above)} is neither a linear layer nor an activation")
            found.append(module)
            at = outside

    def _unmoved(self, view: ModuleGraph, node: fx.Node) -> tuple[ModuleGraph, fx.Node]:
        """What computes a vector (N, C), by whatever shape it goes."""
        while True:
            view, node = self.flow.origin(view, node)
            source = node.args[0] if node.args else None
            if (of(node).views or of(node).casts) and isinstance(source, fx.Node) and is_tensor(source) and (
                    _vector(node) == _vector(source) is not None):
                node = source
                continue
            return view, node

    def _check_mean(self, view: ModuleGraph, node: fx.Node, start: fx.Node, axis: int) -> None:
        x = argument(node, "input")
        above, source = self.flow.outward(view, x)
        if source is not start:
            raise Refusal(f"its squeeze reads {spelled(source, above)}, and not its input alone")
        dims = argument(node, "output_size" if of(node).pools else "dim")
        if of(node).pools:
            whole = dims in (1, (1, 1), [1, 1]) and axis == 1
        else:
            gone = {d % x.meta["val"].dim() for d in ([dims] if isinstance(dims, int) else dims or ())}
            whole = gone == set(range(1, x.meta["val"].dim())) - {axis}
        if not whole:
            raise Refusal("its squeeze is not the mean over all positions")

    def _vector_step(self, view: ModuleGraph, node: fx.Node) -> tuple[fx.Node, Affine] | None:
        """What a linear layer on a vector is computed from, and its map."""
        x = argument(node, "input")
        if (name_of(node) == "linear" or name_of(node) in CONVS) and is_tensor(x) and self._is_pointwise(view, node) and (
                _vector(x) is not None and _vector(node) is not None):
            return x, self._layer(view, node)
        return None

    def _scalar(self, view: ModuleGraph, node: fx.Node) -> tuple[fx.Node, float] | None:
        return next(((x, float(k)) for x, k in products(node) if isinstance(k, (int, float))), None)

    # towards what a block's input is made of

    def sources(self, view: ModuleGraph, node: fx.Node, axis: int) -> tuple[list[Source], str]:
        """The tensors whose mean tells that of `node`, itself first, and why there are no more."""
        start = Source(*self.flow.outward(view, node), axis)
        found = [start]
        while True:
            last = found[-1]
            view, node = self.flow.origin(last.view, last.node)
            try:
                x, at, step = self._step(view, node, last.axis)
            except Refusal as reason:
                return found, str(reason)
            view, node = self.flow.outward(view, x)
            if self._is_written_before(start.view.call, view, node):
                return found, f"{spelled(node, view)} is changed in place later"
            found.append(Source(view, node, at, last.steps if step is None else (*last.steps, step)))

    def _is_written_before(self, end: Call, view: ModuleGraph, node: fx.Node) -> bool:
        """Whether something writes into the memory of a value after it was computed, until the call `end` is over."""
        written, at = {storage(node.meta["val"])}, view.index[node]
        while True:
            if view.writes_after(at, written):
                return True
            above = None if view.call.begin <= end.begin < view.call.end else self.flow.caller(view)
            if above is None:
                return False
            given = self.flow.bound(view.module, above[1])
            seen: list[tuple[object, object]] = [(view.nodes[-1].args[0], above[1])]  # here, and the same there
            inputs = itertools.takewhile(lambda n: n.op == "placeholder", view.nodes)
            seen += [(n, given.get(str(n.target))) for n in inputs]
            written = set[int]().union(*(
                storages(there.meta["val"]) for here, there in seen
                if isinstance(here, fx.Node) and isinstance(there, fx.Node) and written & storages(here.meta["val"])))
            view, at = above[0], above[0].index[above[1]]

    def _step(self, view: ModuleGraph, node: fx.Node, axis: int) -> tuple[fx.Node, int, Callable[[], Affine] | None]:
        """Through one operator that maps each position's channels alike: its input, the channels' axis, and the map.

        Raises:
            Refusal: The operator does something else.
        """
        other = Refusal(f"{spelled(node, view)}{f' in {view.path}' if view.path else ''} is not linear over channels alone")
        x: Any = argument(node, "input")
        if node.op not in ("call_function", "call_method") or not is_tensor(node):
            raise other
        op = of(node)
        if op.name == "linear" or op.name in CONVS:
            if not self._is_pointwise(view, node) or axis != (len(shape(node)) - 1 if op.name == "linear" else 1):
                raise other
            return x, axis, lambda: self._layer(view, node)
        if op.name == "batch_norm" and axis == 1 and not argument(node, "training", False):
            return x, 1, lambda: self._norm(view, node)
        if op.drops and not argument(node, "training", True):
            return x, axis, None
        if op.name in ("mul", "add") and len(node.args) == 2 and not node.kwargs:
            for moving, k in (node.args, node.args[::-1]):
                if isinstance(moving, fx.Node) and is_tensor(moving) and view.moves(moving) and (
                        shape(moving) == shape(node) and self._is_constant(view, k, axis, node)):
                    return moving, axis, lambda k=k: self._shift_or_scale(view, k, axis, node)  # type: ignore[misc]
        if (op.views or op.casts) and is_tensor(x):
            t, s = node.meta["val"], x.meta["val"]
            at = channel_axis(s)
            if at is not None and channel_axis(t) == axis and t.numel() == s.numel() and t.shape[axis] == s.shape[at] and (
                    batch_is_first(t) and batch_is_first(s) and t.shape[0] == s.shape[0]):
                return x, at, None
        raise other

    def _is_pointwise(self, view: ModuleGraph, node: fx.Node) -> bool:
        """Whether a layer looks at one position at a time, with weights that no input reaches."""
        _, weight, bias, _ = layer_arguments(node)
        if not isinstance(weight, fx.Node) or any(isinstance(p, fx.Node) and view.moves(p) for p in (weight, bias)):
            return False
        if name_of(node) == "linear":
            return True
        stride, padding = argument(node, "stride", 1), argument(node, "padding", 0)
        return set(shape(weight)[2:]) == {1} and set(_each(stride)) == {1} and (
            padding in ("valid", "same") or set(_each(padding)) == {0})

    def _layer(self, view: ModuleGraph, node: fx.Node) -> Affine:
        _, weight, bias, groups = layer_arguments(node)
        w = self.value(view, weight).double().flatten(1)
        b = w.new_zeros(len(w)) if bias is None else self.value(view, bias).double()
        return Affine(torch.block_diag(*w.chunk(groups)) if groups > 1 else w, b)

    def _norm(self, view: ModuleGraph, node: fx.Node) -> Affine:
        mean, var, weight, bias = (
            None if a is None else self.value(view, a).double()
            for a in (argument(node, n) for n in ("running_mean", "running_var", "weight", "bias")))
        assert mean is not None and var is not None
        scale = torch.rsqrt(var + argument(node, "eps", 1e-5)) * (1 if weight is None else weight)
        return Affine(scale, (0 if bias is None else bias) - mean * scale)

    @staticmethod
    def _is_constant(view: ModuleGraph, k: Any, axis: int, node: fx.Node) -> bool:
        """Whether an operand is a number, or a constant tensor that differs between channels alone."""
        if not isinstance(k, fx.Node):
            return isinstance(k, (int, float))
        if not is_tensor(k) or view.moves(k):
            return False
        sizes = [1] * (len(shape(node)) - len(shape(k))) + list(shape(k))
        return all(n == 1 for d, n in enumerate(sizes) if d != axis)

    def _shift_or_scale(self, view: ModuleGraph, k: Any, axis: int, node: fx.Node) -> Affine:
        channels = shape(node)[axis]
        value = torch.as_tensor(self.value(view, k)).double().flatten().expand(channels)
        if name_of(node) == "mul":
            return Affine(value, torch.zeros_like(value))
        return Affine(torch.ones_like(value), value)

    def value(self, view: ModuleGraph, node: Any) -> torch.Tensor:
        """The value of a node that no input reaches."""
        if not isinstance(node, fx.Node):
            return node  # type: ignore[no-any-return]
        if node.op == "get_attr":
            name = f"{view.path}.{node.target}" if view.path else str(node.target)
            if name not in self.values:
                raise Refusal(f"{name} is neither a parameter nor a buffer")
            return self.values[name]
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.value(view, n))
        return compute(node, args, kwargs)  # type: ignore[no-any-return]


def _each(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _vector(node: fx.Node) -> tuple[int, int] | None:
    """(N, C) of a value with one position, in whatever layout; None for others."""
    sizes = shape(node)
    wide = [n for n in sizes[1:] if n != 1]
    return (sizes[0], wide[0] if wide else 1) if len(sizes) > 1 and len(wide) < 2 else None


def _is_elementwise(view: ModuleGraph) -> bool:
    """Whether a forward works on each element alone, and has no parameters."""
    return not any(True for _ in view.module.parameters()) and all(
        n.op in ("placeholder", "output") or of(n).elementwise for n in view.nodes if n.op == "output" or is_tensor(n))
