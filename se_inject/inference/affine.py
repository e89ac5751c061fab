"""A linear map over channels, the same at all positions, and how to read it off an operator."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ..capture.graphs import compute
from ..dataflow.module_graph import ModuleGraph, spelled
from ..dataflow.ops import argument, is_tensor, layer_arguments, name_of, shape
from ..errors import Refusal


@dataclasses.dataclass(eq=False)
class Affine:
    """A linear map, with a bias, from one tensor's channels to another's.

    `weight` is (out, in), or (channels,) for a factor on each channel.
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def after(self, other: Affine) -> Affine:
        """The map that does `other` first; the weight of `self` is (out, in)."""
        weight = self.weight * other.weight if other.weight.dim() == 1 else self.weight @ other.weight
        return Affine(weight, self.bias + self.weight @ other.bias)


class Maps:
    """The maps of a model's operators, in double precision.

    Args:
        values: The model's parameters and buffers by name, with their values: inside `on_meta` the model has none.
    """

    def __init__(self, values: Mapping[str, torch.Tensor]) -> None:
        self.values = values

    def layer(self, view: ModuleGraph, node: fx.Node) -> Affine:
        """The map of a linear layer, or of a pointwise convolution (`is_pointwise`)."""
        _, weight, bias, groups = layer_arguments(node)
        w = self.value(view, weight).double().flatten(1)
        b = w.new_zeros(len(w)) if bias is None else self.value(view, bias).double()
        return Affine(torch.block_diag(*w.chunk(groups)) if groups > 1 else w, b)

    def norm(self, view: ModuleGraph, node: fx.Node) -> Affine:
        """The map of a batch norm in eval mode."""
        mean, var, weight, bias = (
            None if a is None else self.value(view, a).double()
            for a in (argument(node, n) for n in ("running_mean", "running_var", "weight", "bias")))
        assert mean is not None and var is not None
        scale = torch.rsqrt(var + argument(node, "eps", 1e-5)) * (1 if weight is None else weight)
        return Affine(scale, (0 if bias is None else bias) - mean * scale)

    def constant(self, view: ModuleGraph, node: fx.Node, k: Any, axis: int) -> Affine:
        """The map of a product with the constant `k`, or of a sum with it; `axis` is that of the channels."""
        channels = shape(node)[axis]
        value = torch.as_tensor(self.value(view, k)).double().flatten().expand(channels)
        if name_of(node) == "mul":
            return Affine(value, torch.zeros_like(value))
        return Affine(torch.ones_like(value), value)

    def value(self, view: ModuleGraph, node: Any) -> Any:
        """The value of an argument that does not depend on the module's input.

        Raises:
            Refusal: It depends on a tensor that is neither a parameter nor a buffer, or that is changed in place.
        """
        if not isinstance(node, fx.Node):
            return node
        if node.meta.get("writes") or (is_tensor(node) and view.is_written_after(node)):
            raise Refusal(f"{spelled(node, view)} is changed in place")
        if node.op == "get_attr":
            name = f"{view.path}.{node.target}" if view.path else str(node.target)
            if name not in self.values:
                raise Refusal(f"{name} is neither a parameter nor a buffer")
            return self.values[name]
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.value(view, n))
        return compute(node, args, kwargs)


def is_pointwise(view: ModuleGraph, node: fx.Node) -> bool:
    """Whether a convolution or linear layer maps each position by itself, with weights that do not depend on an input."""
    _, weight, bias, _ = layer_arguments(node)
    if not isinstance(weight, fx.Node) or any(isinstance(p, fx.Node) and view.moves(p) for p in (weight, bias)):
        return False
    if name_of(node) == "linear":
        return True
    stride, padding = argument(node, "stride", 1), argument(node, "padding", 0)
    return set(shape(weight)[2:]) == {1} and set(_each(stride)) == {1} and (
        padding in ("valid", "same") or set(_each(padding)) == {0})


def _each(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)
