"""`fold`: replace gates that hardly vary by their mean over real data, multiplied into the weights around them."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ..capture.example import Example, Inputs, asked
from ..capture.snapshot import all_or_nothing, evaluating
from ..errors import ConfigError, SEInjectError
from ..surgery.pipeline import forget_injections
from ..surgery.refusals import refuse_changed_owners, refuse_plain
from ..surgery.session import copied
from ..surgery.state import given_inputs, injections_of, set_injections
from .batches import batches, first_of
from .gate_statistics import measure
from .gates import GatedBlock, find_blocks_for, reason_to_keep
from .proof import compare, reasons_of_methods
from .replacement import replace_blocks
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
    are two copies of the model in memory while this runs. A block stays where ``forward_features`` or
    ``forward_intermediates`` would return features without its gate.

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
        SEInjectError: The model has no blocks, or an owner of one was changed since; the loader gives no images, or images
            that the model does not take; a gate or an output is not finite, or the outputs are no tensors.

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
    refuse_changed_owners(model, "fold")
    if any(p.is_inference() for p in model.parameters()) and not torch.is_inference_mode_enabled():
        raise SEInjectError(
            "fold: the model was made in inference mode, outside which its weights cannot be changed: call fold inside "
            "torch.inference_mode(), too, or make the model outside")
    if max_variation is not None and not (isinstance(max_variation, numbers.Real) and max_variation >= 0):
        raise ConfigError(f"max_variation={max_variation!r}: expected a number of at least 0, such as 0.05, or None for all")
    if isinstance(loader, Iterator):
        raise SEInjectError(
            f"fold({type(model).__name__}, loader): the loader is an iterator, and fold needs two passes: pass a DataLoader "
            "or a list")
    inputs = asked(None, example_inputs)
    inputs = given_inputs(model) if inputs is None else inputs
    with evaluating(model):
        first = first_of("fold", model, batches("fold", loader, model, inputs))
        blocks = find_blocks_for("fold", model, first.arguments, inputs)
        measured = [(gate, statistics.add) for b in blocks for gate, statistics in b.measured()]
        measure("fold", model, _arguments(loader, model, inputs), measured)
        for b in blocks:
            b.reason = reason_to_keep("fold", b, max_variation)
        reasons = reasons_of_methods(model, [b for b in blocks if b.reason is None], first.arguments)
        for b in blocks:
            b.reason = b.reason or reasons.get(b.site.path)
        folded = [b for b in blocks if b.reason is None]
        before = copied(model, "fold")
    with all_or_nothing(model, [model.get_parameter(s.key) for b in folded for s in b.scalings]):
        replace_blocks(model, folded)
        with evaluating(model):
            outputs = compare(before, model, _arguments(loader, model, inputs), folded)
        if folded:
            _forget_blocks(model, [b.site.path for b in blocks if b.reason is not None])
    return FoldReport(tuple(map(_folded_site, blocks)), *outputs)


def _arguments(loader: Iterable[Any], model: nn.Module, inputs: Inputs) -> Iterator[Example]:
    return (batch.arguments for batch in batches("fold", loader, model, inputs))


def _folded_site(b: GatedBlock) -> FoldedSite:
    into = tuple(s.key for s in b.scalings) if b.reason is None else ()
    return FoldedSite(b.site.path, b.statistics.mean_of_channels, b.variation, b.reason, into)


def _forget_blocks(model: nn.Module, kept: Collection[str]) -> None:
    """Let a model's injections have only the blocks at these paths; without any, the model is a base."""
    injections = []
    for injection in injections_of(model):
        sites = tuple(s for s in injection.sites if s.path in kept)
        if sites:  # chosen by name, so that a rebuilt model has no others
            config = dataclasses.replace(
                injection.config, filter_fn=None, include=tuple(s.path for s in sites), exclude=None)
            injections.append(dataclasses.replace(injection, config=config, sites=sites))
    if injections:
        set_injections(model, tuple(injections))
    else:
        forget_injections(model)
