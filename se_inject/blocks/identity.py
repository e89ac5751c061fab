"""TODO"""

from __future__ import annotations

import functools
import math

import torch
from torch import nn

from ..errors import ConfigError


@torch.no_grad()
def mirror(layer: nn.Module) -> None:
    """Make the second half of a layer's units the negative of the first half.

    A narrow block whose ReLU units are all off gives its zeroed last layer no gradient; of a unit
    and its mirror, one is on.
    """
    for parameter in layer.parameters():
        half = parameter.shape[0] // 2
        parameter[half:2 * half] = -parameter[:half]


@functools.cache
def identity_gain(gate_layer: str) -> float:
    """The factor that makes a gate exactly 1 where its argument is 0, and lets it learn from there.

    Raises:
        ConfigError: There is none: the gate is 0, flat, or no power of two there.
    """
    from timm.layers import create_act_layer

    try:
        gate = create_act_layer(gate_layer)
    except (KeyError, AssertionError, TypeError) as error:
        raise ConfigError(f"gate_layer={gate_layer!r}: timm's create_act has no such name; use 'sigmoid'") from error
    at_zero, slope = gate_at_zero(gate)
    if at_zero <= 0 or math.frexp(at_zero)[0] != 0.5 or slope == 0:
        raise ConfigError(
            f"gate_layer={gate_layer!r} with init='identity': the gate is {at_zero:g} with slope {slope:g} at 0, "
            "and an exact, trainable identity needs a power of two and a slope; use gate_layer='sigmoid' or init='timm'")
    return 1.0 / at_zero


def gate_at_zero(gate: nn.Module | None) -> tuple[float, float]:
    """Value and slope of a gate function at 0."""
    with torch.enable_grad(), torch.device("cpu"):
        zero = torch.zeros(1, requires_grad=True)
        value = gate(zero * 1.0) if gate is not None else zero
        (slope,) = torch.autograd.grad(value.sum(), zero)
    return float(value.detach()), float(slope)


class ScaledGate(nn.Module):
    """A gate function times a constant."""

    def __init__(self, gate: nn.Module, gain: float) -> None:
        super().__init__()
        self.gate = gate
        self.gain = gain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.gate(x) * self.gain
        return y

    def extra_repr(self) -> str:
        return f"gain={self.gain:g}"
