"""The model before and after a fold, on the same images: how much its outputs changed, and a proof of the fold itself."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..capture.example import Example
from ..errors import SEInjectError
from ..surgery.session import copied
from ..timm_names import FEATURE_METHODS
from ..undo import undone
from .batches import run
from .gates import GatedBlock
from .replacement import replace_blocks


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
        expected, found = _outputs(before, batch), _outputs(after, batch)
        if images == 0 and not _is_proven(before, after, batch, folded):
            raise SEInjectError(
                "fold: the folded weights do not do what the mean gates do, which is a defect of se_inject, or rounding in a "
                "model that does not run in double precision; the model was not changed: fold fewer blocks with max_variation, "
                "or eject()")
        images += batch.batch
        if not _have_same_shapes(expected, found):
            raise SEInjectError(
                "fold: the shapes of the model's outputs depend on the values of the images, so that they cannot be compared; "
                "the model was not changed")
        for a, b in zip(expected, found):
            if a.is_floating_point() or a.is_complex():
                change += _squares(_wide(a) - _wide(b))
                size += _squares(a)
        classes = classes and len(found) == 1 and found[0].dim() == 2 and found[0].is_floating_point()
        same += int((expected[0].argmax(-1) == found[0].argmax(-1)).sum()) if classes else 0
    if not math.isfinite(change) or not math.isfinite(size):
        raise SEInjectError("fold: the model's outputs are NaN or infinite on these images; the model was not changed")
    if images == 0:
        raise SEInjectError(
            "fold: the loader gave no batch in its second pass; the model was not changed: pass a DataLoader or a list")
    return Comparison(images, math.sqrt(change / size) if size else 0.0, same / images if classes else None)


def reasons_of_methods(model: nn.Module, blocks: Iterable[GatedBlock], batch: Example) -> dict[str, str]:
    """Why `fold` keeps blocks, by path, whose gate would leave what another method than `forward` returns."""
    found = [b for b in blocks if _leaves_owner(model, b)]
    methods = [method for method in FEATURE_METHODS if found and _takes(model, batch, method)]

    def without_gate(some: list[GatedBlock]) -> str | None:
        after = copied(model, "fold")
        replace_blocks(after, some)
        return next((method for method in methods if not _is_proven(model, after, batch, some, method)), None)

    if not methods or without_gate(found) is None:
        return {}
    wrong = [(b, method) for b in found if (method := without_gate([b])) is not None]
    return {b.site.path: f"what {method} returns would be without its gate, which goes into {b.scalings[0].key}"
            for b, method in wrong}


def _leaves_owner(model: nn.Module, b: GatedBlock) -> bool:
    """Whether a gate goes into a layer outside the block's owner. What is inside is returned by no method, but of chains."""
    owner = model.get_submodule(b.site.owner)
    return owner is model or isinstance(owner, nn.Sequential) or not all(
        s.key.startswith(f"{b.site.owner}.") for s in b.scalings)


def _takes(model: nn.Module, batch: Example, method: str) -> bool:
    """Whether a model has a method, and the method takes these inputs."""
    try:
        _outputs(model, batch, method)
    except SEInjectError:
        return False
    return True


def _is_proven(
    before: nn.Module, after: nn.Module, batch: Example, folded: Collection[GatedBlock], method: str = "forward"
) -> bool:  # fmt: skip
    """Whether a method of the folded model does what it does in the model whose blocks multiply by their mean gates.

    If they differ by more than usual rounding, both are made again in double precision: some models amplify rounding.
    """
    with _constant_gates(before, folded):
        expected = _outputs(before, batch, method)
    if _is_close(expected, _outputs(after, batch, method)):
        return True
    if all(not t.is_floating_point() or t.dtype == torch.float64 for t in batch.tensors):
        return False
    before = copy.deepcopy(before).double()
    wide = copy.deepcopy(before)
    replace_blocks(wide, folded)
    if not _is_close([*wide.parameters()], [*after.parameters()]):
        return False
    try:
        return _is_proven(before, wide, batch.double(), folded, method)
    except SEInjectError:  # the model has casts of its own
        return False


def _outputs(model: nn.Module, batch: Example, method: str = "forward") -> list[torch.Tensor]:
    """The tensors that a model returns, or another method of it; what it draws is the same in each run.

    Raises:
        SEInjectError: It returns something else.
    """
    with torch.random.fork_rng(devices=sorted({p.device.index for p in model.parameters() if p.is_cuda})):
        torch.manual_seed(0)
        leaves = tree_leaves(run("fold", model, batch, method))
    found = [t for t in leaves if isinstance(t, torch.Tensor)]
    other = [type(t).__name__ for t in leaves if not isinstance(t, (torch.Tensor, bool, int, float, str, type(None)))]
    if other or not found:
        what = f"an object of class {other[0]}" if other else "no tensor"
        raise SEInjectError(
            f"fold: the model returns {what}, so that its outputs cannot be compared; the model was not changed: fold a model "
            "that returns tensors, in tuples, lists or dicts")
    return found


def _have_same_shapes(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return [t.shape for t in a] == [t.shape for t in b]


def _squares(t: torch.Tensor) -> float:
    """The sum of the squares of the absolute values."""
    return float(t.abs().double().square().sum())


def _is_close(expected: list[torch.Tensor], found: list[torch.Tensor]) -> bool:
    """Whether no output deviates by more than the square root of its dtype's precision, relative to its norm."""
    if not _have_same_shapes(expected, found):
        return False
    for a, b in zip(expected, found):
        if not (b.is_floating_point() or b.is_complex()):
            if not torch.equal(a, b):
                return False
        elif _squares(_wide(a) - _wide(b)) > torch.finfo(b.dtype).eps * _squares(a):
            return False
    return True


def _wide(t: torch.Tensor) -> torch.Tensor:
    return t.to(torch.complex128 if t.is_complex() else torch.float64)


@contextlib.contextmanager
def _constant_gates(model: nn.Module, blocks: Iterable[GatedBlock]) -> Iterator[None]:
    """Inside, these blocks of the model do nothing but multiply by their mean gates, and add their mean shifts."""
    def forward(b: GatedBlock) -> Callable[[torch.Tensor], torch.Tensor]:
        def output(x: torch.Tensor) -> torch.Tensor:
            axis = b.channel_axis(x.dim())
            sizes = [-1 if d == axis else 1 for d in range(x.dim())]
            y: torch.Tensor = x * b.statistics.mean.to(x.device, x.dtype).view(sizes)
            return y if b.bias is None else y + b.shift_statistics.mean.to(x.device, x.dtype).view(sizes)
        return output

    found = [(model.get_submodule(b.site.path), forward(b)) for b in blocks]
    with undone(lambda: [m.__dict__.pop("forward", None) for m, _ in found]):
        for m, constant in found:
            m.__dict__["forward"] = constant
        yield
