"""`fold`: replace gates that hardly vary by their mean over real data, multiplied into the weights around them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..capture.example import Example, Inputs, asked
from ..capture.inputs import input_sizes
from ..capture.snapshot import all_or_nothing, evaluating
from ..errors import ConfigError, SEInjectError, TraceError
from ..surgery.refusals import refuse_plain
from ..surgery.state import given_inputs
from .gate_statistics import measure
from .gates import GatedBlock, find_blocks
from .proof import compare
from .replacement import forget_blocks, replace_blocks
from .report import FoldedSite, FoldReport


@torch.no_grad()
def fold(
    model: nn.Module, loader: Iterable[Any], *, max_variation: float | None = None, example_inputs: Any = None,
) -> FoldReport:  # fmt: skip
    """Replace gates by their mean over real data, in place, and take their blocks out.

    The mean gate is a factor for each channel. It is multiplied into the weights before the block, or into those behind it.
    If all blocks are folded, the model is a plain base model, and its state dict is a base checkpoint. A gate that is the
    same for all images changes the outputs by rounding alone; for other gates, the report says by how much.

    The model runs in eval mode; afterwards all `training` flags are as before. On any error the model is as it was. There
    are two copies of the model in memory while this runs.

    Args:
        model: An injected model; changed in place.
        loader: Batches of images, or of tuples or lists with the images first, as timm's loaders give them. It is iterated
            twice, so a generator will not do.
        max_variation: Fold only blocks whose gate varies at most this much, see `FoldedSite.variation`. The other blocks
            stay, and `save` and `load` still work. None folds all blocks whose gate can go into weights.
        example_inputs: The arguments of the model, as `inject` takes them, where it takes other inputs than images: a batch of
            the loader then is a tuple that begins with them, or a dict that has them by name. None is what `inject` was given.

    Returns:
        For each block the mean gate, its variation, and the tensors that took it in or the reason why the block was kept;
        and how much the outputs changed.

    Raises:
        ConfigError: `model` is no model, or `max_variation` no number of at least 0.
        TraceError: The model is wrapped, compiled or scripted.
        SEInjectError: The model has no blocks; the loader gives no images, or images that the model does not take; a gate or
            an output is not finite.

    Shape:
        Images: (N, C, H, W), (N, C, L) or (N, C, D, H, W), floating point; N may differ from batch to batch.

    Source: Hu et al., Squeeze-and-Excitation Networks, arXiv 1709.01507, section 7.2, find gates in the last stage that hardly
        vary. Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, arXiv 1906.04721,
        section 4, rescale layers across activations in the same manner.

    Example:
        >>> import se_inject, timm, torch
        >>> model = se_inject.inject(timm.create_model("test_resnet"))
        >>> report = se_inject.fold(model, [torch.randn(4, 3, 160, 160)], max_variation=0.05)
        >>> len(report.folded), len(report.kept)
        (4, 0)
        >>> base = timm.create_model("test_resnet")
        >>> base.load_state_dict(model.state_dict(), strict=True)
        <All keys matched successfully>
    """
    refuse_plain(model, "fold")
    if max_variation is not None and not (isinstance(max_variation, (int, float)) and max_variation >= 0):
        raise ConfigError(f"max_variation={max_variation!r}: expected a number of at least 0, such as 0.05, or None for all")
    inputs = asked(None, example_inputs)
    inputs = given_inputs(model) if inputs is None else inputs
    with evaluating(model):
        blocks = _find(model, loader, inputs)
        measure(model, _batches(loader, model, inputs), [m for b in blocks for m in b.measured()])
        for b in blocks:
            b.reason = _reason_to_keep(b, max_variation)
        folded = [b for b in blocks if b.reason is None]
        before = copy.deepcopy(model)
    with all_or_nothing(model, [model.get_parameter(s.key) for b in folded for s in b.scalings]):
        replace_blocks(model, folded)
        with evaluating(model):
            outputs = compare(before, model, _batches(loader, model, inputs), folded)
        if folded:
            forget_blocks(model, [b.site.path for b in blocks if b.reason is not None])
    return FoldReport(tuple(map(_folded_site, blocks)), *outputs)


def _find(model: nn.Module, loader: Iterable[Any], inputs: Inputs) -> list[GatedBlock]:
    """The blocks, found on images of the size of the first batch.

    Raises:
        SEInjectError: The loader gives no batch, or only once, or the model does not take its images.
    """
    name = type(model).__name__
    if iter(loader) is loader:
        raise SEInjectError(
            f"fold({name}, loader): the loader is an iterator, and fold needs two passes: pass a DataLoader or a list")
    first = next(_batches(loader, model, inputs), None)
    if first is None:
        raise SEInjectError(f"fold({name}, loader): the loader gave no batch; it must give image tensors (N, C, H, W)")
    try:
        return find_blocks(model, first.on_meta() if isinstance(inputs, Example) else first.size)
    except TraceError as error:
        raise SEInjectError(
            f"fold({name}): the model does not take the loader's images, of (C, H, W) = {first.size}: {error}") from error


def _batches(loader: Iterable[Any], model: nn.Module, inputs: Inputs) -> Iterator[Example]:
    """The arguments of the model in each batch, on its device.

    Raises:
        SEInjectError: A batch has other arguments.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    dims = 1 + len(input_sizes(model)[0])
    for batch in loader:
        found = _arguments(batch, inputs) if isinstance(inputs, Example) else _images(batch, dims)
        if all(t.dim() == 0 or len(t) for t in found.tensors):
            yield found.to(device)


def _images(batch: Any, dims: int) -> Example:
    images = batch[0] if isinstance(batch, (list, tuple)) and batch else batch
    if not isinstance(images, torch.Tensor) or images.dim() != dims or not images.is_floating_point():
        what = f"a tensor of {tuple(images.shape)} and {images.dtype}" if isinstance(images, torch.Tensor) else (
            f"a {type(images).__name__}")
        raise SEInjectError(
            f"fold: the loader gave {what}; it must give batches of floating-point images (N, C, H, W), or tuples with "
            "the images first; for a model that takes other inputs, pass example_inputs=")
    return Example((images,))


def _arguments(batch: Any, inputs: Example) -> Example:
    """Of a batch the arguments that `inputs` has: by name, or the first ones."""
    given = tuple(batch) if isinstance(batch, (list, tuple)) else (batch,)
    if inputs.kwargs:
        if isinstance(batch, Mapping) and inputs.kwargs.keys() <= batch.keys():
            return Example.of({name: batch[name] for name in inputs.kwargs}, on_meta=False)
    elif len(given) >= len(inputs.args):
        return Example.of(given[:len(inputs.args)], on_meta=False)
    raise SEInjectError(
        f"fold: the loader gave a {type(batch).__name__}, and the model was given {inputs}: it must give batches of such "
        "arguments, a tuple or a dict of them")


def _reason_to_keep(b: GatedBlock, max_variation: float | None) -> str | None:
    """Why a block is kept, now that its gate has been measured; None if it can be folded.

    Raises:
        SEInjectError: The gate is not finite.
    """
    variation = b.variation
    if not (b.statistics.is_finite and b.shift_statistics.is_finite):
        raise SEInjectError(
            f"fold: the gate of {b.site.path!r} is NaN or infinite on these images; the model was not changed: check its "
            "weights and the normalization of the images")
    if b.reason is not None:
        return b.reason
    if max_variation is not None and not variation <= max_variation:
        return f"its {'gate' if b.bias is None else 'gate or shift'} varies by {variation:.3g}, more than {max_variation:g}"
    if bool((b.factors < 0).any()) and b.scalings:
        return "its mean gate is negative, and would not pass a ReLU"
    return None


def _folded_site(b: GatedBlock) -> FoldedSite:
    into = tuple(s.key for s in b.scalings) if b.reason is None else ()
    return FoldedSite(b.site.path, b.statistics.mean_of_channels, b.variation, b.reason, into)
