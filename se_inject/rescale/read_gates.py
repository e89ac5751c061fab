"""`gates`: what the gates of a model do on real data, by channel and by class."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..capture.example import Example, Inputs, asked
from ..capture.snapshot import evaluating
from ..errors import SEInjectError
from ..find.attention import Gate
from ..surgery.refusals import refuse_plain
from ..surgery.state import given_inputs
from .batches import Batch, batches, first_of, labels_of
from .gate_report import GateReport, SiteGates
from .gate_statistics import ClassMeans, Labels, measure
from .gates import GatedBlock, find_blocks_for, reason_to_keep


@torch.no_grad()
def gates(
    model: nn.Module, loader: Iterable[Any], *, class_names: Sequence[str] | None = None, example_inputs: Any = None,
) -> GateReport:  # fmt: skip
    """Read the gate of each block on real data: its mean by channel and by class, and how much it varies. Changes nothing.

    The gate is what a block multiplies its map by, one factor for each image and channel; it is 1 for all in a model that
    was injected and not trained. Blocks without such a gate are left out, with the reason: the gate of `cbam` or `coord`
    differs from place to place, and `gca` adds and does not multiply. A shift that a block adds is not part of its gate.

    The model runs in eval mode; afterwards all `training` flags are as before. There is one pass over the images, and memory
    does not grow with their number.

    Args:
        model: An injected model.
        loader: Batches of images, or of tuples or lists with the images first and their labels second, as a DataLoader gives
            them. A label is a class number or a name; a negative number is none.
        class_names: The names of the classes, by number. None shows the labels.
        example_inputs: The arguments of the model, as `fold` takes them. None is what `inject` was given.

    Returns:
        For each site the mean gate by channel and class, and its deviation.

    Raises:
        ConfigError: `model` is no model.
        TraceError: The model is wrapped, compiled or scripted.
        SEInjectError: The model has no blocks; the loader gives no images, images of a size that the model does not take, or
            other labels; `class_names` is too short; a gate is not finite.

    Shape:
        Images: (N, C, H, W), (N, C, L) or (N, C, D, H, W), floating point; labels: (N,). N may differ from batch to batch.

    Source: Hu et al., Squeeze-and-Excitation Networks, arXiv 1709.01507, section 7.2, figures 6 and 7.

    Example:
        >>> import se_inject, timm, torch
        >>> model = se_inject.inject(timm.create_model("test_resnet"))
        >>> batch = torch.randn(4, 3, 160, 160), torch.tensor([0, 1, 0, 1])
        >>> report = se_inject.gates(model, [batch], class_names=["cat", "dog"])
        >>> report.classes, report.sites[0].class_means.shape
        (('cat', 'dog'), torch.Size([2, 32]))
    """
    refuse_plain(model, "gates")
    inputs = asked(None, example_inputs)
    inputs = given_inputs(model) if inputs is None else inputs
    with evaluating(model):
        found = batches("gates", loader, model, inputs)
        first = first_of("gates", model, found)
        labels = Labels()
        readings = [_Reading(b, labels) for b in find_blocks_for("gates", model, first.arguments, inputs)]
        arguments = _counted(itertools.chain([first], found), labels, inputs)
        measure("gates", model, arguments, [measured for r in readings for measured in r.measured()])
        left_out = {r.block.site.path: reason for r in readings if (reason := r.reason_to_leave_out()) is not None}
        read = [r.block for r in readings if r.block.site.path not in left_out]
        kept = {b.site.path: reason_to_keep("gates", b, None) for b in read}
    classes, rows = _sorted(labels)
    return GateReport(
        tuple(r.result(rows, kept[path]) for r in readings if (path := r.block.site.path) in kept), left_out, labels.images,
        tuple(_named(c, class_names) for c in classes), tuple(labels.counts[c] for c in classes))


class _Reading:
    """The gates of one block, as the batches come."""

    def __init__(self, block: GatedBlock, labels: Labels) -> None:
        self.block = block
        self.labels = labels
        self.class_means = ClassMeans()

    def measured(self) -> list[tuple[Gate, Callable[[torch.Tensor], object]]]:
        """What is measured, each with what takes it: the gate, and what `fold` asks of a shift."""
        b = self.block
        return [(gate, self.add if statistics is b.statistics else statistics.add) for gate, statistics in b.measured()]

    def add(self, gates: torch.Tensor) -> None:
        self.block.statistics.add(gates)
        if len(gates) == len(self.labels.rows):
            self.class_means.add(gates, self.labels.rows)

    def reason_to_leave_out(self) -> str | None:
        if self.block.gate is None:
            return self.block.reason
        maps = self.block.statistics.images
        return None if maps == self.labels.images else f"it gates {maps} maps of {self.labels.images} images"

    def result(self, rows: list[int], kept: str | None) -> SiteGates:
        """The report of the block, with the means of the classes in the order of `rows`, and why `fold` would keep it."""
        b = self.block
        return SiteGates(
            b.site.path, b.site.stage, b.statistics.mean, b.statistics.deviation, self.class_means.means[rows],
            b.variation, kept)


def _counted(found: Iterable[Batch], labels: Labels, inputs: Inputs) -> Iterator[Example]:
    """The arguments of the model in each batch, whose labels are read before."""
    for batch in found:
        labels.start(batch.arguments.batch, labels_of("gates", batch, inputs))
        yield batch.arguments


def _sorted(labels: Labels) -> tuple[list[Hashable], list[int]]:
    """The classes in order, numbers before names, and for each its number in the order in which they came."""
    numbers = {c: i for i, c in enumerate(labels.counts)}
    classes = sorted(numbers, key=lambda c: (isinstance(c, str), c))
    return classes, [numbers[c] for c in classes]


def _named(label: Any, names: Sequence[str] | None) -> int | str:
    if names is None or isinstance(label, str):
        return label  # type: ignore[no-any-return]
    if label >= len(names):
        raise SEInjectError(f"gates: the loader gave class {label}, and class_names has {len(names)} names")
    return str(names[label])
