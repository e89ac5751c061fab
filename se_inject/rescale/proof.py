"""The model before and after a fold, on the same images: how much its outputs changed, and a proof of the fold itself."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..capture.example import Example
from ..capture.values import tensors
from ..errors import SEInjectError
from ..undo import undone
from .gates import GatedBlock


class Comparison(NamedTuple):
    """How outputs changed; see the attributes of `FoldReport`."""

    images: int
    change: float
    agreement: float | None


def compare(
    before: nn.Module, after: nn.Module, batches: Iterable[Example], folded: Collection[GatedBlock]
) -> Comparison:
    """Run both models on all images; on the first batch, prove that `after` is `before` with constant gates.

    Raises:
        SEInjectError: There is no batch, an output is not finite, or the proof fails.
    """
    images, change, size, same, classes = 0, 0.0, 0.0, 0, True
    for batch in batches:
        expected, found = tensors(batch.run(before)), tensors(batch.run(after))
        if images == 0:
            _prove(before, after, batch, found, folded)
        images += batch.batch
        for a, b in zip(expected, found):
            change += float((a.double() - b.double()).square().sum())
            size += float(a.double().square().sum())
        classes = classes and len(found) == 1 and found[0].dim() == 2
        same += int((expected[0].argmax(-1) == found[0].argmax(-1)).sum()) if classes else 0
    if not math.isfinite(change) or not math.isfinite(size):
        raise SEInjectError("fold: the model's outputs are NaN or infinite on these images; the model was not changed")
    if images == 0:
        raise SEInjectError(
            "fold: the loader gave no batch in its second pass; the model was not changed: pass a DataLoader or a list")
    return Comparison(images, math.sqrt(change / size) if size else 0.0, same / images if classes else None)


def _prove(
    before: nn.Module, after: nn.Module, batch: Example, found: list[torch.Tensor], folded: Collection[GatedBlock]
) -> None:  # fmt: skip
    """Compare the folded model with the model whose blocks multiply by their mean gates.

    If they differ by more than usual rounding, they are compared again in double precision: some models amplify rounding.

    Raises:
        SEInjectError: They differ in double precision, too.
    """
    with _constant_gates(before, folded):
        expected = tensors(batch.run(before))
    if _is_close(expected, found):
        return
    if any(t.is_floating_point() and t.dtype != torch.float64 for t in batch.tensors):
        before, after, batch = copy.deepcopy(before).double(), copy.deepcopy(after).double(), batch.double()
        _prove(before, after, batch, tensors(batch.run(after)), folded)
        return
    raise SEInjectError(
        "fold: the folded weights do not do what the mean gates do, which is a defect of se_inject; the model was not "
        "changed: fold fewer blocks with max_variation, or eject()")


def _is_close(expected: list[torch.Tensor], found: list[torch.Tensor]) -> bool:
    """Whether no output deviates by more than the square root of its dtype's precision, relative to its norm."""
    for a, b in zip(expected, found):
        off = (a.double() - b.double()).square().sum().sqrt()
        if off > math.sqrt(torch.finfo(b.dtype).eps) * a.double().square().sum().sqrt():
            return False
    return True


@contextlib.contextmanager
def _constant_gates(model: nn.Module, blocks: Iterable[GatedBlock]) -> Iterator[None]:
    """Inside, these blocks of the model multiply by their mean gates."""
    def hook(b: GatedBlock) -> Any:
        def output(module: nn.Module, args: Any, _: torch.Tensor) -> torch.Tensor:
            x = args[0]
            axis = b.channel_axis(x.dim())
            sizes = [-1 if d == axis else 1 for d in range(x.dim())]
            y: torch.Tensor = x * b.statistics.mean.to(x.device, x.dtype).view(sizes)
            return y if b.bias is None else y + b.shift_statistics.mean.to(x.device, x.dtype).view(sizes)
        return output

    handles = [model.get_submodule(b.site.path).register_forward_hook(hook(b)) for b in blocks]
    with undone(lambda: [*map(RemovableHandle.remove, handles)]):
        yield
