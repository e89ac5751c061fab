"""Rebuild the model that a file describes: the plain timm model of its base, and its blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..capture.inputs import without_values
from ..config import SEConfig
from ..errors import WeightsError
from ..surgery.pipeline import inject
from ..surgery.state import block_paths, injections_of
from ..timm_names import base_name, skeleton, split_options, unknown_model_message
from .reading import Checkpoint
from .recipe import Recipe

# Options that change the function of a block, but not the shapes of its tensors.
_BY_FUNCTION = ("block", "placement", "init", "act_layer", "gate_layer")


def base_of(
    found: Checkpoint, name: str | None, path: object, *, pretrained: bool = False, meta: bool = False
) -> nn.Module:  # fmt: skip
    """Create the plain timm model that the weights of a checkpoint are for. Does not load them.

    Args:
        found: The checkpoint; it says its architecture, or `name` does.
        name: A timm name, or None.
        path: The file, for the messages.
        pretrained: Give the model timm's pretrained weights.
        meta: Create it without memory for weights; see `without_values`.

    Raises:
        WeightsError: Neither says the architecture, or timm does not have it, or timm rejects the arguments that the file
            says.
    """
    import timm

    bare = base_architecture(found, name, path)
    said = split_options(found.model_args)[1]
    args = {**infer_model_args(bare, found.tensors), **said}
    try:
        if meta:
            return without_values(lambda: timm.create_model(bare, **args))
        return timm.create_model(bare, pretrained=pretrained, **args)
    except Exception as error:
        if pretrained or not said:
            raise
        raise WeightsError(
            f"{str(path)!r}: timm cannot create {bare!r} with the arguments that the file says, {said} ({error!r}): "
            "save the model again, with the timm that created it") from error


def base_architecture(found: Checkpoint, name: str | None, path: object) -> str:
    """The timm name of the base that the weights of a checkpoint are for. `name` overrides what the file says.

    Raises:
        WeightsError: Neither says it, or timm does not have it.
    """
    import timm

    said = name or found.architecture
    if not said:
        raise WeightsError(
            f"{str(path)!r} does not say its architecture: give it a timm name, as in model='resnet50' "
            "or --model resnet50")
    bare = base_name(said)
    if not timm.is_model(bare):
        raise WeightsError(f"{str(path)!r}: {unknown_model_message(said, bare)}")
    return bare


def infer_model_args(name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """`num_classes` and `in_chans` of a timm model, from the shapes of its weights."""
    import timm

    cfg = timm.get_pretrained_cfg(name)
    args: dict[str, Any] = {}
    if cfg is None:
        return args
    plain: dict[str, torch.Tensor] = {}
    for key, layer, dim, usual in (
        ("num_classes", cfg.classifier, 0, cfg.num_classes), ("in_chans", cfg.first_conv, 1, cfg.input_size[0])):
        first = layer[0] if isinstance(layer, (list, tuple)) and layer else layer
        weight = tensors.get(f"{first}.weight")
        if weight is None or weight.dim() <= dim:
            continue
        size = weight.shape[dim]
        if size != usual:  # the layer may have several columns for each channel
            plain = plain or skeleton(name).state_dict()
            own = plain.get(f"{first}.weight")
            if own is not None:
                size = size * usual // own.shape[dim]
        args[key] = int(size)
    return args


def inject_as_said(
    net: nn.Module, found: Checkpoint, options: dict[str, Any], path: object, *, verify: bool = False
) -> None:
    """Inject `net` as the recipe of the file says. Without a recipe, its ``se_`` arguments and `options` say it.

    Raises:
        WeightsError: The options of the recipe lead to other blocks than the recipe names.
    """
    if found.recipe is None:
        said, _ = split_options(found.model_args)
        for config in said if len(said) > 1 else (SEConfig.of(said[0], **options),):
            inject(net, config, verify=verify)
        return
    for config, size in zip(found.recipe.configs, found.recipe.input_sizes):
        inject(net, config, input_size=size, verify=verify)
    here, there = {s.path for i in injections_of(net) for s in i.sites}, set(found.recipe.sites)
    if here != there:
        differ = sorted(here ^ there)
        raise WeightsError(
            f"{str(path)!r}: its options lead to {len(here)} blocks in {type(net).__name__}, and it names {len(there)} "
            f"({', '.join(differ[:3])} {'are' if len(differ) > 1 else 'is'} in only one of the two): load it with the "
            "versions of timm and se_inject that saved it, or into the model that it was saved from")


def said_blocks(found: Checkpoint, path: object) -> tuple[tuple[str, ...], tuple[SEConfig, ...]]:
    """Paths and options of the blocks in a file without a recipe, if its architecture is a twin. Otherwise none.

    Raises:
        WeightsError: timm does not have the architecture, or rejects the arguments that the file says.
    """
    if found.recipe is not None or base_name(found.architecture or "") == (found.architecture or ""):
        return (), ()
    net = base_of(found, None, path, meta=True)
    inject_as_said(net, found, {}, path)
    sites = tuple(p for p in block_paths(net) if any(k.startswith(f"{p}.") for k in found.tensors))
    return sites, tuple(i.config for i in injections_of(net)) if sites else ()


def check_blocks(net: nn.Module, recipe: Recipe, path: object) -> None:
    """Refuse blocks that compute another function of the same weights.

    Raises:
        WeightsError: The injections of the model differ from the recipe in an option that shapes do not show.
    """

    def said(configs: Iterable[SEConfig]) -> set[tuple[Any, ...]]:
        return {tuple(getattr(c, name) for name in _BY_FUNCTION) for c in configs}

    injections = injections_of(net)
    theirs, ours = said(recipe.configs), said(i.config for i in injections)
    equal = recipe.configs == tuple(i.written() for i in injections) and (
        recipe.sites == tuple(s.path for i in injections for s in i.sites))
    if theirs != ours or (len(ours) > 1 and not equal):  # with several injections, each block needs its own options
        raise WeightsError(
            f"{str(path)!r}: its blocks were made with {', '.join(_BY_FUNCTION)} = {theirs}, and those of the model with "
            f"{ours}: inject the model with the options of the file, or load the file into a model without blocks")
