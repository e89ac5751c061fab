"""The module of a gate's merged layers: their weights, and the operators that a forward calls to compute the gate."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx, nn

from .affine import Affine
from .programs import is_program

Layer = Affine | nn.Module | str | float  # a map, an activation, a method that works in place, a factor on the result


def pool(x: torch.Tensor, dims: list[int]) -> tuple[torch.Tensor, float]:
    """A tensor and a number whose product is the mean of `x` over `dims`: the next layer does the division.

    The tensor is the sum. It is the mean in float16, where a sum can overflow; under autocast, where the next layer may be in
    float16; and in programs, where the number would be that of the traced size.
    """
    if torch.jit.is_scripting():  # TorchScript does not compile the other branch
        return x.mean(dims), 1.0
    else:
        if is_program(x) or x.dtype is torch.float16 or (not x.is_meta and torch.is_autocast_enabled(x.device.type)):
            return x.mean(dims), 1.0
        return x.sum(dims), 1 / math.prod(x.shape[d] for d in dims)


class MergedGate(nn.Module):
    """The weights of a gate. It has no forward: `insert` puts the operators into the forward of the module around.

    With one image, calling a layer as a module takes longer than computing it, so the layers are calls of functions. Weights
    are (in, out), which is the faster order for the product of one row with a matrix.

    Args:
        dims: The axes of the positions, to take the mean over.
        layers: From the mean (N, C_in) to the gate (N, C).
        shape: The gate's shape without the batch, such as (C, 1, 1): it is broadcast to the block's input.
        like: A tensor with the device and dtype for the weights.
    """

    def __init__(self, dims: tuple[int, ...], layers: list[Layer], shape: tuple[int, ...], like: torch.Tensor) -> None:
        super().__init__()
        self.dims = dims
        self.shape = shape
        self.steps: list[str | float] = []
        for layer in layers:
            i = 1 + sum(isinstance(step, str) and step.startswith("weight") for step in self.steps)
            if isinstance(layer, Affine):
                self.register_parameter(f"weight{i}", nn.Parameter(layer.weight.T.to(like).contiguous(), requires_grad=False))
                self.register_parameter(f"bias{i}", nn.Parameter(layer.bias.to(like), requires_grad=False))
                self.steps.append(f"weight{i}")
            elif isinstance(layer, nn.Module):
                name = f"act{1 + len(self._modules)}"
                self.add_module(name, layer)
                self.steps.append(name)
            else:
                self.steps.append(layer)

    def insert(self, graph: fx.Graph, path: str, x: fx.Node) -> tuple[fx.Node, float]:
        """Insert the gate of `x` at the graph's insert point. The block's output is its input times the gate times the number.

        `path` is the path of this module from the graph's.
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
        else:  # `x` is a vector; the other layers work in place
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
