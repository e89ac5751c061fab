"""What is left of a squeeze-and-excitation block for inference: the gate, computed from the mean of some tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from .axes import batch_is_first, channel_axis
from .errors import TraceError
from .factors import CONVS, DIVISIONS, MEANS, conv_arguments, spelled
from .flow import Flow
from .graph import ADDS, LAYOUTS, MULS, View, is_tensor, shape
from .patterns import argument

_MEANS = {t for t in MEANS if "mean" in str(t)}
_POOLS = {F.adaptive_avg_pool2d, F.adaptive_avg_pool1d, torch.adaptive_avg_pool1d}
_ELEMENTWISE = {
    F.relu, F.relu_, F.relu6, F.silu, F.gelu, F.hardswish, F.hardsigmoid, F.hardtanh, F.leaky_relu, F.elu, F.mish, F.softplus,
    F.sigmoid, F.tanh, torch.relu, torch.sigmoid, torch.tanh, "relu", "sigmoid", "sigmoid_", "tanh", "tanh_", "clamp"} | (
        MULS | ADDS | DIVISIONS)
_BATCH_NORMS = {F.batch_norm, torch.batch_norm}
Values = Callable[[str], torch.Tensor]  # the tensor of that name, with its values


class NotLinear(Exception):
    """Why a squeeze stays where it is."""


class Excitation(nn.Module):
    """The gate of a squeeze-and-excitation block, from the mean over positions of a tensor.

    Args:
        dims: The axes of the positions.
        layers: From the mean (N, C_in) to the gate (N, C).
        shape: The gate's shape without the batch, such as (C, 1, 1); it is broadcast to what it gates.

    Shape: (N, C_in, H, W), or as `dims` says; the output is (N, *shape).
    """

    def __init__(self, dims: tuple[int, ...], layers: list[nn.Module], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.dims = dims
        self.layers = nn.ModuleList(layers)
        self.shape = shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        s = x.mean(self.dims)
        for layer in self.layers:
            s = layer(s)
        return s.view(-1, *self.shape)

    def extra_repr(self) -> str:
        return f"dims={self.dims}, shape={self.shape}"


class Scale(nn.Module):
    """Multiplies by a constant, in place."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mul_(self.factor)

    def extra_repr(self) -> str:
        return f"{self.factor:g}"


class Elementwise(nn.Module):
    """An activation that the block's own forward calls as a function, or a method of its tensor."""

    def __init__(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.target = target
        self.args = args
        self.kwargs = kwargs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        function = getattr(x, self.target) if isinstance(self.target, str) else self.target
        y: torch.Tensor = function(*self.args, **self.kwargs) if isinstance(self.target, str) else function(
            x, *self.args, **self.kwargs)
        return y

    def extra_repr(self) -> str:
        return str(getattr(self.target, "__name__", self.target))


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

    def linear(self, like: torch.Tensor) -> nn.Linear:
        assert self.weight.dim() == 2
        rows, columns = self.weight.shape
        layer = nn.Linear(columns, rows, device="meta")
        layer.weight = nn.Parameter(self.weight.to(like), requires_grad=False)
        layer.bias = nn.Parameter(self.bias.to(like), requires_grad=False)
        return layer


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

    def __init__(self, flow: Flow, values: Values) -> None:
        self.flow = flow
        self.values = values

    # the block

    def layers_of(self, view: View, gate: fx.Node, start: fx.Node, axis: int) -> list[nn.Module | Affine]:
        """The layers from the mean of `start`, the block's input, to its gate; adjoining linear ones are one.

        `axis` is that of the channels.

        Raises:
            NotLinear: The gate is computed in another way.
        """
        found: list[nn.Module | Affine] = []
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
            if scaled is not None:
                found.append(Scale(scaled[1]))
                at = above, scaled[0]
                continue
            if node.target in _ELEMENTWISE and isinstance(node.args[0], fx.Node) and list(node.all_input_nodes) == [
                    node.args[0]] and above.module is view.module:
                found.append(Elementwise(node.target, tuple(node.args[1:]), dict(node.kwargs)))
                at = above, node.args[0]
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
            if view.is_written_after(node):
                return found, f"{spelled(node, view)} is changed in place later"
            found.append(Source(view, node, at, last.steps if step is None else (*last.steps, step)))

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
        if node.target in _BATCH_NORMS and axis == 1 and not argument(node, 5, "training", False):
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
            return self.values(f"{view.path}.{node.target}" if view.path else str(node.target))
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
