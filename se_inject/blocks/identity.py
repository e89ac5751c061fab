"""How a block starts as an identity: all its gates are exactly 1, and they learn from there.

A gate function is not 1 at 0: the sigmoid is 1/2. So the last layer before a gate is zeroed, and the gate is multiplied
by a constant gain: ``2 * sigmoid(0) == 1``. The gradient of the zeroed layer is not zero, so that the block learns.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from ..undo import entered

_NO_STATE = vars(nn.Module())
_ZEROED = "_se_zeroed"  # attribute of a block that started as an identity: names of the layers that `make_identity` zeroed


@dataclasses.dataclass(frozen=True)
class Start:
    """The modules of a block that make it an identity, by dotted names in the block.

    Attributes:
        zero: Layers to zero: the last one before each gate.
        gates: Gate functions, each to be multiplied by a gain.
        first: A layer before ReLU units, to be mirrored, so that some of the units are on.
    """

    zero: tuple[str, ...] = ()
    gates: tuple[str, ...] = ()
    first: str | None = None


class HasGain(nn.Module):
    """A module that multiplies its gate by the constant `gain`."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = gain


class ScaledGate(HasGain):
    """A gate function times a constant, for the blocks that have no gain of their own."""

    def __init__(self, gate: nn.Module, gain: float) -> None:
        super().__init__(gain)
        self.gate = gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.gate(x) * self.gain
        return y

    def extra_repr(self) -> str:
        return f"gain={self.gain:g}"


@torch.no_grad()
def make_identity(start: Start, block: nn.Module, outer_gain: float = 1.0) -> None:
    """Make `block` an identity, in place: a new block, or again a trained one.

    Args:
        start: The modules of the block that matter here.
        block: A block of any weights.
        outer_gain: A factor that the model applies to the output of the block; the first gate is divided by it.

    Raises:
        ConfigError: A gate is not a power of two or is flat at 0, or `start` names a module that the block does not have.
    """
    for path in start.zero:
        for parameter in _module(block, path).parameters():
            nn.init.zeros_(parameter)
    if start.first is not None:
        _mirror(_module(block, start.first))
    for i, path in enumerate(start.gates):
        owner_path, _, name = path.rpartition(".")
        owner, gate = _module(block, owner_path), _module(block, path)
        if isinstance(gate, ScaledGate):  # of an earlier call
            gate = gate.gate
        gain = _unit_gain(gate, block) / (outer_gain if i == 0 else 1.0)
        if isinstance(owner, HasGain):
            owner.gain = gain
        else:
            setattr(owner, name, ScaledGate(gate, gain))
    block.__dict__[_ZEROED] = list(start.zero)


def is_identity(block: nn.Module) -> bool:
    """Whether a block is still the identity that it started as: the layers before its gates are zero, or on the meta device."""
    zeroed = [m.get_submodule(path) for m in block.modules() for path in m.__dict__.get(_ZEROED, ())]
    weights = [p for layer in zeroed for p in layer.parameters()]
    return bool(weights) and not any(not p.is_meta and bool(p.any()) for p in weights)


def gains(block: nn.Module) -> list[tuple[nn.Module, float]]:
    """The modules of a block that multiply a gate by a constant other than 1, each with the constant."""
    return [(m, m.gain) for m in block.modules() if isinstance(m, HasGain) and m.gain != 1.0]


def _mirror(layer: nn.Module) -> None:
    """Make the second half of a layer's units the negative of the first half.

    If all ReLU units of a narrow block are off, its zeroed last layer gets no gradient. Of a unit and its mirror, one is
    on.
    """
    for parameter in layer.parameters():
        half = parameter.shape[0] // 2
        parameter[half:2 * half] = -parameter[:half]


def _unit_gain(gate: nn.Module, block: nn.Module) -> float:
    """The factor that makes a gate function exactly 1 at 0.

    Raises:
        ConfigError: There is none: the gate is 0, flat, or not a power of two there.
    """
    state = {key: value for key, value in vars(gate).items() if value != _NO_STATE.get(key)}
    plain = all(isinstance(value, (bool, int, float, str)) for value in state.values())
    cls: Any = type(gate)
    if plain and cls.__module__.startswith(("torch.", "timm.")):  # a function of the class and its options alone
        at_zero, slope = _known_at_zero(cls, tuple(state.items()))
    else:
        at_zero, slope = _at_zero(gate)
    if at_zero <= 0 or math.frexp(at_zero)[0] != 0.5 or slope == 0:
        raise ConfigError(
            f"init='identity': the gate of {type(block).__name__}, {type(gate).__name__}, is {at_zero:g} with slope "
            f"{slope:g} at 0, and an exact, trainable identity needs a power of two and a slope; "
            "use gate_layer='sigmoid' or init='timm'")
    return 1.0 / at_zero


def _at_zero(gate: nn.Module) -> tuple[float, float]:
    """The value and the slope of a gate function at 0."""
    with entered(torch.enable_grad(), torch.device("cpu")):
        zero = torch.zeros(1, requires_grad=True)
        value = gate(zero * 1.0)
        (slope,) = torch.autograd.grad(value.sum(), zero)
    return float(value.detach()), float(slope)


@functools.lru_cache(maxsize=64)
def _known_at_zero(cls: Any, state: tuple[tuple[str, Any], ...]) -> tuple[float, float]:
    gate: nn.Module = cls.__new__(cls)
    nn.Module.__init__(gate)
    vars(gate).update(state)
    return _at_zero(gate)


def _module(block: nn.Module, path: str) -> nn.Module:
    """The module of `block` with this name.

    Raises:
        ConfigError: There is none.
    """
    try:
        return block.get_submodule(path)
    except AttributeError:
        names = ", ".join(name for name, _ in block.named_modules() if name)
        raise ConfigError(
            f"init='identity': {type(block).__name__} has no module {path!r}, as its zero, gates or first say: "
            f"give register_block names of its modules ({names or 'it has none'})") from None
