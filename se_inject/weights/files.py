"""Save and load: one safetensors file holds the weights and the recipe that rebuilds the model."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..capture.inputs import without_values
from ..config import SEConfig
from ..errors import ConfigError, WeightsError
from ..surgery.load_hooks import Parts
from ..surgery.pipeline import eject, inject
from ..surgery.refusals import refuse_optimized
from ..surgery.state import block_paths, injections_of
from ..timm_names import base_name, skeleton, split_options, unknown_model_message
from .reading import Checkpoint, read_checkpoint
from .recipe import CONTENTS, KEY, PARTS, Recipe
from .strict import load_strictly
from .writing import gathered, is_sharded, write_safetensors


def save(
    model: nn.Module, path: str | os.PathLike[str], *, only: str | Sequence[str] | None = None,
    metadata: Mapping[str, str] | None = None, max_shard_size: int | str = "5GB",
) -> None:  # fmt: skip
    """Write an injected model's weights and recipe to a safetensors file. The model is not changed.

    The file is written beside `path` and renamed, so that an interrupted save loses nothing. A model above
    `max_shard_size` goes to several files with Hugging Face's index, ``<path without suffix>.safetensors.index.json``,
    which `load` finds by `path`, too.
    Of a model that ``fully_shard`` has sharded the weights are gathered: all ranks call this, and the first one writes.

    Args:
        model: An injected model, also within DDP or torch.compile.
        path: Where to write; conventionally ``*.safetensors``.
        only: ``"se"`` writes the blocks alone, ``"head"`` the classifier, ``("se", "head")`` both; they are loaded
            over any base weights.
        metadata: More strings for the file's header; not changed.
        max_shard_size: In bytes, or as ``"5GB"``.

    Raises:
        WeightsError: The model has no blocks or no head, something in its recipe cannot be written, or `path` cannot.
        ConfigError: `only` or `max_shard_size` is none of these.
    """
    model = unwrapped(model)
    refuse_optimized(model, "save")
    injections = injections_of(model)
    if not injections:
        inside = next((name for name, m in model.named_modules() if injections_of(m)), None)
        if inside is not None:
            raise WeightsError(
                f"save({type(model).__name__}): the injected model is inside of this one: "
                f"write save(model.get_submodule({inside!r}), path)")
        raise WeightsError(
            f"save({type(model).__name__}): this model has no blocks; inject() it first, "
            "or write it with safetensors.torch.save_file(model.state_dict(), path)")
    wanted = [only] if isinstance(only, str) else list(only) if isinstance(only, (list, tuple, set, frozenset)) else []
    if only is not None and (not wanted or any(name not in PARTS for name in wanted)):
        raise ConfigError(f"only={only!r}: expected 'se' (the blocks), 'head' (the classifier), both, or None (everything)")
    tensors = dict(model.state_dict())
    if wanted:
        parts = Parts.of(model)
        kept = {key for name in wanted for key in getattr(parts, name)}
        tensors = {key: t for key, t in tensors.items() if key in kept}
    if not tensors:
        raise WeightsError(f"save({type(model).__name__}, only={only!r}): this model has no classifier; write only='se'")
    recipe = Recipe.of(model, injections, "+".join(name for name in PARTS if name in wanted) or "full")
    if any(is_sharded(t) for t in tensors.values()):
        first = torch.distributed.get_rank() == 0
        tensors = gathered(tensors, keep=first)
        if not first:
            return
    write_safetensors(path, tensors, {**(metadata or {}), KEY: recipe.to_json()}, max_shard_size)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model within DDP, torch.compile or timm's EMA."""
    from timm.utils import unwrap_model

    if not isinstance(model, nn.Module):
        raise ConfigError(f"expected a torch.nn.Module, found {type(model).__name__}")
    if injections_of(model):
        return model
    inner: nn.Module = unwrap_model(model)
    return inner


def load(
    path: str | os.PathLike[str], model: nn.Module | str | None = None, *,
    base: str | os.PathLike[str] | None = None, head: str | os.PathLike[str] | None = None, pretrained: bool = False,
    model_args: Mapping[str, Any] | None = None, device: torch.device | str | None = None,
    dtype: torch.dtype | None = None, **options: Any,
) -> nn.Module:  # fmt: skip
    """Build an injected model from files of weights.

    Args:
        path: A file of `save`, full or of blocks or head alone, or any checkpoint of the base's weights.
        model: Where the file does not say it: a timm name, or a model, which is injected (unless it
            is already) and loaded in place.
        base: A second file, with the base's weights, for a `path` that lacks them.
        head: A further file, whose classifier is taken instead of that of the others; a full one will do.
        pretrained: Take timm's pretrained weights for the base, for a `path` that lacks them.
        model_args: Arguments of `timm.create_model` that the file does not say, such as ``img_size``; not changed.
        device: Where to put a model that is built here; None is torch's default.
        dtype: Its type; None is torch's default, whatever that of the file.
        **options: Fields of `SEConfig`, for a file without a recipe.

    Returns:
        The model, in eval mode; a given model in the mode that it had.

    Raises:
        WeightsError: A file cannot be read or does not fit, or the weights of the base are nowhere. A given model is
            then as it was.
        ConfigError: An option is wrong, or the file has its own recipe.
    """
    return load_found(
        read_checkpoint(path), path, model, base=base, head=head, pretrained=pretrained, model_args=model_args,
        device=device, dtype=dtype, **options)


def load_found(
    found: Checkpoint, path: str | os.PathLike[str], model: nn.Module | str | None = None, *,
    base: str | os.PathLike[str] | None = None, head: str | os.PathLike[str] | None = None, pretrained: bool = False,
    model_args: Mapping[str, Any] | None = None, device: torch.device | str | None = None,
    dtype: torch.dtype | None = None, **options: Any,
) -> nn.Module:  # fmt: skip
    """`load` for a file that was read already, so that none is read twice."""
    found = dataclasses.replace(found, model_args={**found.model_args, **(model_args or {})})
    _check_request(found, path, model, base, pretrained, model_args, options)
    below = None if base is None else _read_base(base, found, path, model)
    top = {} if head is None else read_checkpoint(head).tensors
    given = isinstance(model, nn.Module)
    if isinstance(model, nn.Module):
        net = model
    else:
        everything = {**(below.tensors if below else {}), **found.tensors, **top}
        sizes = infer_model_args(base_architecture(found, model, path), everything) if below or top else {}
        args = {**found.model_args, **sizes}  # classes and channels are those of the weights that are taken
        net = base_of(dataclasses.replace(found, tensors=everything, model_args=args), model, path, pretrained=pretrained)
        if device is not None or dtype is not None:
            net.to(device=device, dtype=dtype)
    mine = not injections_of(net)
    try:
        if mine:
            _inject_as_said(net, found, options, path)
        elif found.recipe is not None:
            _check_blocks(net, found.recipe, path)
        parts = Parts.of(net)
        tensors = _joined(net, parts, found, below, base, top, head)
        if not given and not pretrained and parts.is_partial(tensors):  # what was built has random weights
            raise WeightsError(
                f"{', '.join(repr(str(p)) for p in (path, base, head) if p is not None)}: no weights of the base are there, "
                "only those of blocks or head: add base=FILE with them, pretrained=True, or model=a model with weights")
        load_strictly(net, tensors, path, parts)
    except BaseException:
        if given and mine and injections_of(net):
            eject(net)
        raise
    return net if given else net.eval()


def _check_request(
    found: Checkpoint, path: object, model: nn.Module | str | None, base: object, pretrained: bool,
    model_args: Mapping[str, Any] | None, options: dict[str, Any],
) -> None:  # fmt: skip
    """Refuse arguments of `load` that the file contradicts, or that would be ignored.

    Raises:
        ConfigError: As said.
        WeightsError: There would be no weights for the base.
    """
    recipe = found.recipe
    if recipe is not None and options:
        raise ConfigError(
            f"{str(path)!r} has its own recipe, so {', '.join(sorted(options))} cannot be set; "
            "load it without options, or load its base weights into a model and inject that")
    if isinstance(model, nn.Module):
        unused = {"pretrained": pretrained, "model_args": model_args, "options": injections_of(model) and options}
        if any(unused.values()):
            raise ConfigError(
                f"load({str(path)!r}, model={type(model).__name__}): {', '.join(k for k, v in unused.items() if v)} cannot "
                "be set for a model that is already made: make it with them, or give its timm name")
    elif recipe is not None and recipe.content != "full" and base is None and not pretrained:
        raise WeightsError(
            f"{str(path)!r} holds the {CONTENTS[recipe.content]} alone: add base=FILE, pretrained=True, or model=a model "
            f"with weights; in the command, `se-inject merge {path} --base FILE -o FULL`")


def _read_base(
    base: str | os.PathLike[str], found: Checkpoint, path: object, model: nn.Module | str | None
) -> Checkpoint:
    """The file of the base's weights.

    Raises:
        WeightsError: It adds nothing, or is of another architecture.
    """
    below = read_checkpoint(base)
    if below.tensors.keys() <= found.tensors.keys():
        raise WeightsError(
            f"{str(path)!r} has all {len(below.tensors)} tensors of base={str(base)!r}, so none would be taken from there: "
            "leave base out, or give a file of save(only=...) with the parts to be loaded over it")
    if model is None and not _of_one_architecture(found, below):
        raise WeightsError(
            f"{str(path)!r} is of {found.architecture}, and base={str(base)!r} of {below.architecture}, whose weights may "
            f"mean something else: give the base of {found.architecture}, or, if they are to go together, "
            f"model={found.architecture!r}")
    return below


def _joined(
    net: nn.Module, parts: Parts, found: Checkpoint, below: Checkpoint | None, base: object,
    top: Mapping[str, torch.Tensor], head: object,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The tensors of all files: the base's, those of the file over them, and the classifier of `head` over those.

    Raises:
        WeightsError: `head` has not the whole classifier, or the base's file has blocks of another kind that would count.
    """
    lacks = [key for key in parts.head if key not in top and not key.endswith("num_batches_tracked")]
    if top and (lacks or not parts.head):
        raise WeightsError(
            f"{str(head)!r} has no tensors of {'a' if len(lacks) == len(parts.head) else 'the whole'} classifier: "
            f"expected {', '.join(parts.head) or 'none, nor has the model'}")
    under = {} if below is None else below.tensors
    if below is not None and below.recipe is not None and (under.keys() - found.tensors.keys()) & parts.se.keys():
        _check_blocks(net, below.recipe, base)
    return {**under, **found.tensors, **{k: t for k, t in top.items() if k in parts.head}}


def _of_one_architecture(*files: Checkpoint) -> bool:
    """Whether the files that say their architecture say the same."""
    from timm.models import get_arch_name

    return len({get_arch_name(base_name(file.architecture)) for file in files if file.architecture}) <= 1


def _inject_as_said(net: nn.Module, found: Checkpoint, options: dict[str, Any], path: object) -> None:
    """Inject as the recipe says; without one, as the file's ``se_`` arguments of timm's door and `options` do.

    Raises:
        WeightsError: The recipe's options lead to other blocks than those that it names.
    """
    if found.recipe is None:
        said, _ = split_options(found.model_args)
        for config in said if len(said) > 1 else (SEConfig.of(said[0], **options),):
            inject(net, config)
        return
    for config, size in zip(found.recipe.configs, found.recipe.input_sizes):
        inject(net, config, input_size=size)
    here, there = {s.path for i in injections_of(net) for s in i.sites}, set(found.recipe.sites)
    if here != there:
        differ = sorted(here ^ there)
        raise WeightsError(
            f"{str(path)!r}: its options lead to {len(here)} blocks in {type(net).__name__}, and it names {len(there)} "
            f"({', '.join(differ[:3])} {'are' if len(differ) > 1 else 'is'} in one alone): load it with the versions of timm "
            "and se_inject that saved it, or into the model that it was saved from")


def said_blocks(found: Checkpoint, path: object) -> tuple[tuple[str, ...], tuple[SEConfig, ...]]:
    """Paths and options of the blocks in a file without a recipe whose architecture is a twin; else none.

    Raises:
        WeightsError: timm does not have the architecture, or not with the arguments that the file says.
    """
    if found.recipe is not None or base_name(found.architecture or "") == (found.architecture or ""):
        return (), ()
    net = base_of(found, None, path, meta=True)
    _inject_as_said(net, found, {}, path)
    sites = tuple(p for p in block_paths(net) if any(k.startswith(f"{p}.") for k in found.tensors))
    return sites, tuple(i.config for i in injections_of(net)) if sites else ()


def _check_blocks(net: nn.Module, recipe: Recipe, path: object) -> None:
    """Refuse blocks that compute another function of the same weights.

    Raises:
        WeightsError: The model's injections differ in an option that the weights' shapes do not show.
    """
    names = ("block", "placement", "init", "act_layer", "gate_layer")

    def said(configs: Iterable[SEConfig]) -> set[tuple[Any, ...]]:
        return {tuple(getattr(c, name) for name in names) for c in configs}

    injections = injections_of(net)
    theirs, ours = said(recipe.configs), said(i.config for i in injections)
    equal = recipe.configs == tuple(i.written() for i in injections) and (
        recipe.sites == tuple(s.path for i in injections for s in i.sites))
    if theirs != ours or (len(ours) > 1 and not equal):  # which block has which
        raise WeightsError(
            f"{str(path)!r}: its blocks were made with {', '.join(names)} = {theirs}, and those of the model with {ours}: "
            "inject the model with the file's options, or load the file into a model without blocks")


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
        WeightsError: Neither says the architecture, or timm does not have it, or not with the arguments that the
            file says.
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
            f"{str(path)!r}: timm cannot create {bare!r} with the arguments that the file says, {said}: {error!r}; "
            "save the model again, with the timm that made it") from error


def base_architecture(found: Checkpoint, name: str | None, path: object) -> str:
    """The timm name of the base that a checkpoint's weights are for; `name` goes before what the file says.

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
    """`num_classes` and `in_chans` of a timm model's weights, read off their shapes."""
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
