"""Save and load: one safetensors file holds the weights and the recipe that rebuilds the model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .checkpoint import Checkpoint, read_checkpoint, write_atomically
from .config import SEConfig
from .errors import ConfigError, WeightsError
from .loading import block_paths, load_strictly
from .recipe import KEY, Recipe
from .registry import base_name, split_options
from .surgery import eject, inject, injections_of, unknown_model_message, without_values


def save(
    model: nn.Module, path: str | os.PathLike[str], *, only: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Write an injected model's weights and recipe to one safetensors file. The model is not changed.

    The file is written beside `path` and renamed, so that an interrupted save loses nothing.

    Args:
        model: An injected model.
        path: Where to write; conventionally ``*.safetensors``.
        only: ``"se"`` writes the blocks alone, to be loaded over any base weights.
        metadata: More strings for the file's header; not changed.

    Raises:
        WeightsError: The model has no blocks, or something in its recipe cannot be written.
    """
    from safetensors.torch import save_file

    injections = injections_of(model)
    if not injections:
        raise WeightsError(
            f"save({type(model).__name__}): this model has no blocks; inject() it first, "
            "or write it with safetensors.torch.save_file(model.state_dict(), path)")
    if only not in (None, "se"):
        raise WeightsError(f"only={only!r}: expected 'se' (the blocks alone) or None (everything)")
    tensors = dict(model.state_dict())
    if only == "se":
        prefixes = tuple(f"{p}." for p in block_paths(model))
        tensors = {k: t for k, t in tensors.items() if k.startswith(prefixes)}
    recipe = Recipe.of(model, injections, "full" if only is None else "se")
    header = {**(metadata or {}), "format": "pt", KEY: recipe.to_json()}
    write_atomically(path, lambda temporary: save_file(unshared(tensors), temporary, metadata=header))


def unshared(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors, contiguous and sharing no memory, as safetensors wants them."""
    seen: set[int] = set()
    out = {}
    for key, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        out[key] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    return out


def load(
    path: str | os.PathLike[str], model: nn.Module | str | None = None, *,
    base: str | os.PathLike[str] | None = None, pretrained: bool = False, **options: Any,
) -> nn.Module:  # fmt: skip
    """Build an injected model from a file of weights.

    Args:
        path: A file of `save`, full or SE-only, or any checkpoint of the base's weights.
        model: Where the file does not say it: a timm name, or a model, which is injected (unless it
            is already) and loaded in place.
        base: A second file, with the base's weights, for an SE-only file.
        pretrained: Take timm's pretrained weights for the base, for an SE-only file.
        **options: Fields of `SEConfig`, for a file without a recipe.

    Returns:
        The model, in eval mode; a given model in the mode that it had.

    Raises:
        WeightsError: A file cannot be read or does not fit, or an SE-only file has no base.
        ConfigError: An option is wrong, or the file has its own recipe.
    """
    found = read_checkpoint(path)
    recipe = found.recipe
    if recipe is not None and options:
        raise ConfigError(
            f"{str(path)!r} has its own recipe, so {', '.join(sorted(options))} cannot be set; "
            "load it without options, or load its base weights into a model and inject that")
    given = isinstance(model, nn.Module)
    if not given and recipe is not None and recipe.content == "se" and base is None and not pretrained:
        raise WeightsError(
            f"{str(path)!r} holds the blocks alone: add base=FILE, pretrained=True, or model=a model with weights")
    net = model if isinstance(model, nn.Module) else base_of(found, model, path, pretrained=pretrained)
    options = {**split_options(found.model_args)[0].to_dict(), **options}
    configs = recipe.configs if recipe is not None else (SEConfig.of(**options),)
    if base is not None:
        load_strictly(net, read_checkpoint(base).tensors, base)
    mine = not injections_of(net)
    if mine:
        for config in configs:
            inject(net, config)
    try:
        load_strictly(net, found.tensors, path)
    except WeightsError:
        if given and mine:
            eject(net)
        raise
    return net if given else net.eval()


def base_of(
    found: Checkpoint, name: str | None, path: object, *, pretrained: bool = False, meta: bool = False
) -> nn.Module:  # fmt: skip
    """The plain timm model that a checkpoint's weights are for, without them.

    Args:
        found: The checkpoint; it says its architecture, or `name` does.
        name: A timm name, or None.
        path: The file, for the messages.
        pretrained: Give the model timm's pretrained weights.
        meta: Make it without memory for weights; see `without_values`.

    Raises:
        WeightsError: Neither says the architecture, or timm does not have it.
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
    args = {**infer_model_args(bare, found.tensors), **split_options(found.model_args)[1]}
    if meta:
        return without_values(lambda: timm.create_model(bare, **args))
    return timm.create_model(bare, pretrained=pretrained, **args)


def infer_model_args(name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """`num_classes` and `in_chans` of a timm model's weights, read off their shapes."""
    import timm

    cfg = timm.get_pretrained_cfg(name)
    args: dict[str, Any] = {}
    if cfg is None:
        return args
    for key, layer, dim, usual in (
        ("num_classes", cfg.classifier, 0, cfg.num_classes), ("in_chans", cfg.first_conv, 1, cfg.input_size[0])):
        first = layer[0] if isinstance(layer, (list, tuple)) and layer else layer
        weight = tensors.get(f"{first}.weight")
        if weight is not None and weight.dim() > dim and weight.shape[dim] != usual:
            args[key] = int(weight.shape[dim])
    return args
