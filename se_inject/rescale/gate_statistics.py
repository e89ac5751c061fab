"""How much gates and shifts vary from image to image: mean and variation of each, in one pass over the images."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..capture.example import Example
from ..find.attention import Gate
from ..undo import undone


class GateStatistics:
    """Mean and squared deviations of a gate for each channel, over images.

    Welford's method, for batches instead of single values: no gates are kept, and a small variation is not lost to rounding,
    as it would be in a difference of two large sums.

    Attributes:
        images: How many images there were.
        mean: The mean gate (C,), in double precision on the CPU.
    """

    def __init__(self) -> None:
        self.images = 0
        self.mean = torch.zeros((), dtype=torch.float64)
        self._squares = torch.zeros((), dtype=torch.float64)  # sum of the squared deviations from the mean

    def add(self, gates: torch.Tensor) -> None:
        """Add the gates of a batch, of any shape whose elements are N times C."""
        gates = gates.flatten(1).cpu().double()
        n = gates.shape[0]
        mean = gates.mean(0)
        squares = (gates - mean).square().sum(0)
        if self.images == 0:
            self.mean, self._squares = mean, squares
        else:
            total, off = self.images + n, mean - self.mean
            self._squares = self._squares + squares + off.square() * (self.images * n / total)
            self.mean = self.mean + off * (n / total)
        self.images += n

    @property
    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.mean).all() and torch.isfinite(self._squares).all())

    @property
    def mean_of_channels(self) -> float:
        """The mean over images and channels; NaN without images."""
        return float(self.mean.mean()) if self.images else math.nan

    @property
    def variation(self) -> float:
        """The standard deviation over the images, relative to the mean, averaged over the channels; NaN without images."""
        if self.images == 0:
            return math.nan
        deviation = (self._squares / self.images).sqrt()
        relative = torch.where(deviation == 0, torch.zeros_like(deviation), deviation / self.mean.abs())
        return float(relative.mean())


    @property
    def relative_to_all(self) -> float:
        """The same relative to the mean over all channels: single means of a shift may be 0."""
        if self.images == 0:
            return math.nan
        deviation, size = float((self._squares / self.images).sqrt().mean()), float(self.mean.abs().mean())
        return deviation / size if size else math.inf if deviation else 0.0


def measure(model: nn.Module, batches: Iterable[Example], gates: Iterable[tuple[Gate, GateStatistics]]) -> None:
    """Run the model on all images and add its gates to their statistics.

    A gate is computed by its block's own traced code from the block's input. The quotient of the block's output and input
    would not do: the input may be 0.
    """
    def hook(function: nn.Module, statistics: GateStatistics) -> Any:
        return lambda module, args: statistics.add(function(*args))

    handles: list[RemovableHandle] = []
    with undone(lambda: [*map(RemovableHandle.remove, handles)]):
        for gate, statistics in gates:
            owner = gate.view.module
            handles.append(owner.register_forward_pre_hook(hook(gate.function().eval(), statistics)))
        for batch in batches:
            batch.run(model)
