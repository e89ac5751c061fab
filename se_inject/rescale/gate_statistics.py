"""How much gates and shifts vary from image to image: mean and variation of each, in one pass over the images."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..capture.example import Example
from ..find.attention import Gate
from ..undo import undone
from .batches import run


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
    def deviation(self) -> torch.Tensor:
        """The standard deviation over the images, for each channel (C,)."""
        return (self._squares / max(1, self.images)).sqrt()

    @property
    def mean_of_channels(self) -> float:
        """The mean over images and channels; NaN without images."""
        return float(self.mean.mean()) if self.images else math.nan

    @property
    def variation(self) -> float:
        """The standard deviation over the images, relative to the mean, averaged over the channels; NaN without images."""
        if self.images == 0:
            return math.nan
        deviation = self.deviation
        relative = torch.where(deviation == 0, torch.zeros_like(deviation), deviation / self.mean.abs())
        return float(relative.mean())

    @property
    def relative_to_all(self) -> float:
        """The same relative to the mean over all channels: single means of a shift may be 0."""
        if self.images == 0:
            return math.nan
        deviation, size = float(self.deviation.mean()), float(self.mean.abs().mean())
        return deviation / size if size else math.inf if deviation else 0.0


class Labels:
    """The classes of the images of the present batch, and how many images of each class there were.

    Attributes:
        counts: By class, in the order in which they came.
        images: How many images there were.
        rows: For each image of the present batch the number of its class in `counts`; -1 where it has none.
    """

    def __init__(self) -> None:
        self.counts: dict[Hashable, int] = {}
        self.images = 0
        self.rows = torch.empty(0, dtype=torch.long)
        self._numbers: dict[Hashable, int] = {}

    def start(self, images: int, labels: Sequence[Hashable] | None) -> None:
        """Begin a batch. A negative number is no class, as timm's readers give -1 without one."""
        known = [label for label in labels or () if not (isinstance(label, int) and label < 0)]
        for label in known:
            self._numbers.setdefault(label, len(self._numbers))
            self.counts[label] = self.counts.get(label, 0) + 1
        self.images += images
        self.rows = torch.tensor([self._numbers.get(label, -1) for label in labels or (-1,) * images], dtype=torch.long)


class ClassMeans:
    """The mean gate of each class, by sums in double precision: memory grows with the classes, not with the images."""

    def __init__(self) -> None:
        self._sums = torch.zeros(0, 0, dtype=torch.float64)
        self._images = torch.zeros(0, dtype=torch.float64)

    def add(self, gates: torch.Tensor, rows: torch.Tensor) -> None:
        """Add the gates of a batch, each to its class: the number in `rows`, or none if that is -1."""
        gates = gates.flatten(1).cpu().double()[rows >= 0]
        rows = rows[rows >= 0]
        missing = int(rows.max()) + 1 - len(self._sums) if len(rows) else 0
        if missing > 0:
            more = gates.new_zeros(missing, gates.shape[1])
            self._sums = torch.cat([self._sums, more]) if len(self._sums) else more
            self._images = torch.cat([self._images, more.new_zeros(missing)])
        if len(rows):
            self._sums.index_add_(0, rows, gates)
            self._images.index_add_(0, rows, torch.ones_like(rows, dtype=torch.float64))

    @property
    def means(self) -> torch.Tensor:
        """The mean gate of each class (K, C)."""
        return self._sums / self._images[:, None]


def measure(
    what: str, model: nn.Module, batches: Iterable[Example], gates: Iterable[tuple[Gate, Callable[[torch.Tensor], object]]],
) -> None:  # fmt: skip
    """Run the model on all images for the function `what`, and call a function with each gate of each batch.

    A gate is computed by its block's own traced code from the block's input. The quotient of the block's output and input
    would not do: the input may be 0.

    Raises:
        SEInjectError: The model does not take them.
    """
    def hook(function: nn.Module, add: Callable[[torch.Tensor], object]) -> Any:
        def add_gates(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            add(function(*args, **kwargs))

        return add_gates

    handles: list[RemovableHandle] = []
    with undone(lambda: [*map(RemovableHandle.remove, handles)]):
        for gate, add in gates:
            owner = gate.view.module
            handles.append(owner.register_forward_pre_hook(hook(gate.function().eval(), add), with_kwargs=True))
        for batch in batches:
            run(what, model, batch)
