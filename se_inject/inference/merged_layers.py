"""TODO"""

from __future__ import annotations

import dataclasses
import math
import operator
from typing import Any

import torch
from torch import fx, nn


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


class MergedGate(nn.Module):
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
