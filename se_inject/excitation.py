"""What is left of a squeeze-and-excitation block for inference: the gate, computed from the mean of some tensor."""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .axes import batch_is_first, channel_axis
from .errors import TraceError
from .factors import BATCH_NORMS, CONVS, DIVISIONS, MEANS, conv_arguments, spelled
from .flow import Flow
from .graph import ADDS, LAYOUTS, MULS, View, is_tensor, shape
from .memory import storages
from .meta import storage
from .patterns import argument
from .record import Call

_MEANS = {t for t in MEANS if "mean" in str(t)}
_POOLS = {F.adaptive_avg_pool2d, F.adaptive_avg_pool1d, torch.adaptive_avg_pool1d}
_ELEMENTWISE = {
    F.relu, F.relu_, F.relu6, F.silu, F.gelu, F.hardswish, F.hardsigmoid, F.hardtanh, F.leaky_relu, F.elu, F.mish, F.softplus,
    F.sigmoid, F.tanh, torch.relu, torch.sigmoid, torch.tanh, "relu", "sigmoid", "sigmoid_", "tanh", "tanh_", "clamp"} | (
        MULS | ADDS | DIVISIONS)
_METHODS: dict[Any, str] = {
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), "relu_"),
    **dict.fromkeys((F.sigmoid, torch.sigmoid, torch.sigmoid_, "sigmoid", "sigmoid_"), "sigmoid_")}


class NotLinear(Exception):
    """Why a squeeze stays where it is."""


def pool(x: torch.Tensor, dims: list[int]) -> tuple[torch.Tensor, float]:
    """A tensor and a number, whose product is the mean of `x` over `dims`: the layer behind does the division.

    Not where a sum could overflow, in float16, nor where a program is made, which may serve other sizes.
    """
    if torch.jit.is_scripting():  # what is behind it is not compiled
        return x.mean(dims), 1.0
    else:
        if (isinstance(x, fx.Proxy) or torch.compiler.is_compiling() or torch.jit.is_tracing() or x.dtype is torch.float16
                or (not x.is_meta and torch.is_autocast_enabled(x.device.type))):
            return x.mean(dims), 1.0
        return x.sum(dims), 1 / math.prod(x.shape[d] for d in dims)


class Excitation(nn.Module):
    """The weights of a gate; the forward of the module around computes it, see `put_in`.

    At one image the layers take less time than to call them, so they are calls of functions there. Weights are (in, out),
    as a product of one row by a matrix is quicker so.

    Args:
        dims: The axes of the positions, of which the mean is taken.
        layers: From the mean (N, C_in) to the gate (N, C).
        shape: The gate's shape without the batch, such as (C, 1, 1); it is broadcast to what it gates.
        like: A tensor of the device and dtype to have.
    """

    def __init__(self, dims: tuple[int, ...], layers: list[Layer], shape: tuple[int, ...], like: torch.Tensor) -> None:
        super().__init__()
        self.dims = dims
        self.shape = shape
        self.steps: list[str | float] = []
        for layer in layers:
            i = 1 + sum(isinstance(step, str) and step.startswith("weight") for step in self.steps)
            if isinstance(layer, Affine):
                weight = layer.weight if layer.weight.dim() == 2 else torch.diag(layer.weight)
                self.register_parameter(f"weight{i}", nn.Parameter(weight.T.to(like).contiguous(), requires_grad=False))
                self.register_parameter(f"bias{i}", nn.Parameter(layer.bias.to(like), requires_grad=False))
                self.steps.append(f"weight{i}")
            elif isinstance(layer, nn.Module):
                self.add_module(f"act{i}", layer)
                self.steps.append(f"act{i}")
            else:
                self.steps.append(layer)

    def put_in(self, graph: fx.Graph, path: str, x: fx.Node) -> tuple[fx.Node, float]:
        """Compute the gate from `x` at the graph's insert point; the gate is to be multiplied by the number.

        `path` is this module's in that graph.
        """
        number = 1.0
        more: dict[str, Any] = {}
        linear = str(self.steps[0] if self.steps else "").startswith("weight")
        if self.dims and linear:
            pooled = graph.call_function(pool, (x, list(self.dims)))
            s, alpha = (graph.call_function(operator.getitem, (pooled, i)) for i in (0, 1))
            more = {"alpha": alpha}
        elif self.dims:
            s = graph.call_method("mean", (x, self.dims))
        else:  # no positions
            s = x if linear else graph.call_method("clone", (x,))
        for step in self.steps:
            if isinstance(step, float):
                number *= step
            elif step.startswith("weight"):
                weight, bias = (graph.get_attr(f"{path}.{name}") for name in (step, step.replace("weight", "bias")))
                s, more = graph.call_function(torch.addmm, (bias, s, weight), more), {}
            elif step in self._modules:
                s = graph.call_module(f"{path}.{step}", (s,))
            else:
                s = graph.call_method(step, (s,))
        return graph.call_method("view", (s, (-1, *self.shape))), number

    def extra_repr(self) -> str:
        weights = ", ".join(f"{name}: {tuple(p.shape)}" for name, p in self._parameters.items() if p is not None)
        return f"dims={self.dims}, shape={self.shape}, {weights}"


@dataclasses.dataclass(eq=False)
class Affine:
    """The linear map from one tensor's channels to another's, the same at all positions.

    `weight` is (out, in), or (channels) where each channel goes to itself.
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def behind(self, other: Affine) -> Affine:
        """The map that does `other` first."""
        if self.weight.dim() == 1:
            return Affine((self.weight * other.weight.T).T, self.bias + self.weight * other.bias)
        if other.weight.dim() == 1:
            return Affine(self.weight * other.weight, self.bias + self.weight @ other.bias)
        return Affine(self.weight @ other.weight, self.bias + self.weight @ other.bias)


Layer = Affine | nn.Module | str | float  # a linear one, a module, a method that works in place, a factor


@dataclasses.dataclass(eq=False)
class Source:
    """A tensor whose mean tells that of a block's input: a value in a forward, its channel axis, and the maps between,
    the last first."""

    view: View
    node: fx.Node
    axis: int
    steps: tuple[Callable[[], Affine], ...] = ()

    @property
    def channels(self) -> int:
        return shape(self.node)[self.axis]

    @property
    def elements(self) -> int:
        """Elements to read for one image."""
        sizes = shape(self.node)
        count = 1
        for n in sizes[1:]:
            count *= n
        return count


class Lowering:
    """Makes excitations of blocks. Use it inside `abstract`; `values` gives the tensors as they are outside."""

    def __init__(self, flow: Flow, values: Mapping[str, torch.Tensor]) -> None:
        self.flow = flow
        self.values = values

    # the block

    def layers_of(self, view: View, gate: fx.Node, start: fx.Node, axis: int) -> list[Layer]:
        """The layers from the mean of `start`, the block's input, to its gate; adjoining linear ones are one.

        `axis` is that of the channels.

        Raises:
            NotLinear: The gate is computed in another way.
        """
        found: list[Layer] = []
        at: tuple[View, fx.Node] = view, gate
        while True:
            above, node = self._unmoved(*at)
            if node.op == "placeholder":
                raise NotLinear("its gate is not made from the mean of its input alone")
            if node.target in _MEANS | _POOLS:
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
            if node.target in _METHODS and list(node.all_input_nodes) == [node.args[0]]:
                found.append(_METHODS[node.target])
                at = above, node.args[0]  # type: ignore[assignment]
                continue
            module = above.module
            inputs = [n for n in above.nodes if n.op == "placeholder" and is_tensor(n)]
            if len(inputs) != 1 or not _is_elementwise(above):
                raise NotLinear(f"{spelled(node, above)} is neither a linear layer nor an activation")
            outside = self.flow.outward(above, inputs[0])
            if outside[0] is above:
                raise NotLinear(f"{spelled(node, above)} is neither a linear layer nor an activation")
            found.append(module)
            at = outside

    def _unmoved(self, view: View, node: fx.Node) -> tuple[View, fx.Node]:
        """What computes a vector (N, C), by whatever shape it goes."""
        while True:
            view, node = self.flow.origin(view, node)
            source = node.args[0] if node.args else None
            if node.target in LAYOUTS and isinstance(source, fx.Node) and is_tensor(source) and (
                    _vector(node) == _vector(source) is not None):
                node = source
                continue
            return view, node

    def _check_mean(self, view: View, node: fx.Node, start: fx.Node, axis: int) -> None:
        x = argument(node, 0, "input")
        above, source = self.flow.outward(view, x)
        if source is not start:
            raise NotLinear(f"its squeeze reads {spelled(source, above)}, and not its input alone")
        dims = argument(node, 1, "dim" if node.target in _MEANS else "output_size")
        if node.target in _POOLS:
            whole = dims in (1, (1, 1), [1, 1]) and axis == 1
        else:
            gone = {d % x.meta["val"].dim() for d in ([dims] if isinstance(dims, int) else dims or ())}
            whole = gone == set(range(1, x.meta["val"].dim())) - {axis}
        if not whole:
            raise NotLinear("its squeeze is not the mean over all positions")

    def _vector_step(self, view: View, node: fx.Node) -> tuple[fx.Node, Affine] | None:
        """What a linear layer on a vector is computed from, and its map."""
        x = argument(node, 0, "input")
        if (node.target is F.linear or node.target in CONVS) and is_tensor(x) and self._is_pointwise(view, node) and (
                _vector(x) is not None and _vector(node) is not None):
            return x, self._layer(view, node)
        return None

    def _scalar(self, view: View, node: fx.Node) -> tuple[fx.Node, float] | None:
        if node.target in MULS and len(node.args) == 2:
            for x, k in (node.args, node.args[::-1]):
                if isinstance(x, fx.Node) and is_tensor(x) and isinstance(k, (int, float)):
                    return x, float(k)
        return None

    # towards what a block's input is made of

    def sources(self, view: View, node: fx.Node, axis: int) -> tuple[list[Source], str]:
        """The tensors whose mean tells that of `node`, itself first, and why there are no more."""
        start = Source(*self.flow.outward(view, node), axis)
        found = [start]
        while True:
            last = found[-1]
            view, node = self.flow.origin(last.view, last.node)
            try:
                x, at, step = self._step(view, node, last.axis)
            except NotLinear as reason:
                return found, str(reason)
            except TraceError as error:
                return found, str(error)
            view, node = self.flow.outward(view, x)
            if self._is_written_before(start.view.call, view, node):
                return found, f"{spelled(node, view)} is changed in place later"
            found.append(Source(view, node, at, last.steps if step is None else (*last.steps, step)))

    def _is_written_before(self, end: Call, view: View, node: fx.Node) -> bool:
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

    def _step(self, view: View, node: fx.Node, axis: int) -> tuple[fx.Node, int, Callable[[], Affine] | None]:
        """Through one operator that maps each position's channels alike: its input, the channels' axis, and the map.

        Raises:
            NotLinear: The operator does something else.
        """
        other = NotLinear(f"{spelled(node, view)}{f' in {view.path}' if view.path else ''} is not linear over channels alone")
        x: Any = argument(node, 0, "input")
        if node.op not in ("call_function", "call_method") or not is_tensor(node):
            raise other
        if node.target is F.linear or node.target in CONVS:
            if not self._is_pointwise(view, node) or axis != (len(shape(node)) - 1 if node.target is F.linear else 1):
                raise other
            return x, axis, lambda: self._layer(view, node)
        if node.target in BATCH_NORMS and axis == 1 and not argument(node, 5, "training", False):
            return x, 1, lambda: self._norm(view, node)
        if node.target in (F.dropout, F.dropout2d) and not argument(node, 2, "training", True):
            return x, axis, None
        if node.target in MULS | ADDS and len(node.args) == 2 and not node.kwargs:
            for moving, k in (node.args, node.args[::-1]):
                if isinstance(moving, fx.Node) and is_tensor(moving) and view.moves(moving) and (
                        shape(moving) == shape(node) and self._is_constant(view, k, axis, node)):
                    return moving, axis, lambda k=k: self._shift_or_scale(view, k, axis, node)  # type: ignore[misc]
        if node.target in LAYOUTS and is_tensor(x):
            t, s = node.meta["val"], x.meta["val"]
            at = channel_axis(s)
            if at is not None and channel_axis(t) == axis and t.numel() == s.numel() and t.shape[axis] == s.shape[at] and (
                    batch_is_first(t) and batch_is_first(s) and t.shape[0] == s.shape[0]):
                return x, at, None
        raise other

    def _is_pointwise(self, view: View, node: fx.Node) -> bool:
        """Whether a layer looks at one position at a time, with weights that no input reaches."""
        _, weight, bias, _ = conv_arguments(node)
        if not isinstance(weight, fx.Node) or any(isinstance(p, fx.Node) and view.moves(p) for p in (weight, bias)):
            return False
        if node.target is F.linear:
            return True
        stride, padding = argument(node, 3, "stride", 1), argument(node, 4, "padding", 0)
        return set(shape(weight)[2:]) == {1} and set(_each(stride)) == {1} and (
            padding in ("valid", "same") or set(_each(padding)) == {0})

    def _layer(self, view: View, node: fx.Node) -> Affine:
        _, weight, bias, groups = conv_arguments(node)
        w = self.value(view, weight).double().flatten(1)
        b = w.new_zeros(len(w)) if bias is None else self.value(view, bias).double()
        return Affine(torch.block_diag(*w.chunk(groups)) if groups > 1 else w, b)

    def _norm(self, view: View, node: fx.Node) -> Affine:
        mean, var, weight, bias = (
            None if a is None else self.value(view, a).double()
            for a in (argument(node, i, n) for i, n in enumerate(("running_mean", "running_var", "weight", "bias"), 1)))
        assert mean is not None and var is not None
        scale = torch.rsqrt(var + argument(node, 7, "eps", 1e-5)) * (1 if weight is None else weight)
        return Affine(scale, (0 if bias is None else bias) - mean * scale)

    @staticmethod
    def _is_constant(view: View, k: Any, axis: int, node: fx.Node) -> bool:
        """Whether an operand is a number, or a constant tensor that differs between channels alone."""
        if not isinstance(k, fx.Node):
            return isinstance(k, (int, float))
        if not is_tensor(k) or view.moves(k):
            return False
        sizes = [1] * (len(shape(node)) - len(shape(k))) + list(shape(k))
        return all(n == 1 for d, n in enumerate(sizes) if d != axis)

    def _shift_or_scale(self, view: View, k: Any, axis: int, node: fx.Node) -> Affine:
        channels = shape(node)[axis]
        value = torch.as_tensor(self.value(view, k)).double().flatten().expand(channels)
        if node.target in MULS:
            return Affine(value, torch.zeros_like(value))
        return Affine(torch.ones_like(value), value)

    def value(self, view: View, node: Any) -> torch.Tensor:
        """The value of a node that no input reaches."""
        if not isinstance(node, fx.Node):
            return node  # type: ignore[no-any-return]
        if node.op == "get_attr":
            name = f"{view.path}.{node.target}" if view.path else str(node.target)
            if name not in self.values:
                raise NotLinear(f"{name} is neither a parameter nor a buffer")
            return self.values[name]
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.value(view, n))
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[no-any-return, operator]
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)  # type: ignore[no-any-return]
        raise NotLinear(f"{spelled(node, view)} is no constant")


def _each(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _vector(node: fx.Node) -> tuple[int, int] | None:
    """(N, C) of a value with one position, in whatever layout; None for others."""
    sizes = shape(node)
    wide = [n for n in sizes[1:] if n != 1]
    return (sizes[0], wide[0] if wide else 1) if len(sizes) > 1 and len(wide) < 2 else None


def _is_elementwise(view: View) -> bool:
    """Whether a forward works on each element alone, and has no parameters."""
    return not any(True for _ in view.module.parameters()) and all(
        n.op in ("placeholder", "output") or n.target in _ELEMENTWISE for n in view.nodes if n.op == "output" or is_tensor(n))
