"""Rebuild the model that a file describes: the plain timm model of its base, and its blocks."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..capture.inputs import without_values
from ..config import SEConfig
from ..errors import NoSitesError, SEInjectError, WeightsError
from ..private import DropoutNd
from ..surgery.parts import Parts, module_of, own_tensors
from ..surgery.pipeline import apply, inject, prepare
from ..surgery.refusals import injected_inside
from ..surgery.state import base_class, block_paths, head_paths, injections_of
from ..timm_names import base_name, remember_args, skeleton, split_options, unknown_model_message
from .reading import Checkpoint
from .recipe import FULL, Recipe

# Options that change the function of a block, but not the shapes of its tensors.
_BY_FUNCTION = ("block", "placement", "init", "act_layer", "gate_layer")
_GONE = "none"
_SMALL = 2**24  # values that a model may have beyond those of its files: less memory than torch takes itself


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
            says; or the model is much larger than the weights.
    """
    import timm

    bare = base_architecture(found, name, path)
    said = split_options(found.model_args)[1]
    args = {**infer_model_args(bare, found.tensors), **said}
    try:
        if meta:
            return remember_args(without_values(lambda: timm.create_model(bare, **args)), args)
        if not pretrained:
            _check_size(base_parts(bare, args), found.tensors, path, bare)
        return remember_args(timm.create_model(bare, pretrained=pretrained, **args), args)
    except SEInjectError:
        raise
    except Exception as error:
        if pretrained:
            raise WeightsError(f"timm cannot load its pretrained weights of {bare!r} ({error!r}): give base=FILE") from error
        if not said:
            raise
        raise WeightsError(
            f"{str(path)!r}: timm cannot create {bare!r} with the arguments that the file says, {said} ({error!r}): "
            "save the model again, with the timm that created it") from error


def base_parts(name: str, args: dict[str, Any]) -> Parts:
    """The tensors of a plain timm model, without memory."""
    return _outline(name, args)[0]


def _outline(name: str, args: dict[str, Any]) -> tuple[Parts, dict[str, str]]:
    """The tensors of a plain timm model, without memory, and its layers in words, by path."""
    import timm

    try:
        text = json.dumps(args, sort_keys=True)
        plain = json.loads(text) == args
    except (TypeError, ValueError):
        plain = False
    return _json_outline(name, timm.model_entrypoint(name), text) if plain else _make_outline(name, args)


@functools.lru_cache(maxsize=8)
def _json_outline(name: str, entrypoint: object, args: str) -> tuple[Parts, dict[str, str]]:
    """`_outline` of arguments in JSON, which a training that saves often asks for again and again."""
    return _make_outline(name, json.loads(args))


def _make_outline(name: str, args: dict[str, Any]) -> tuple[Parts, dict[str, str]]:
    import timm

    with torch.random.fork_rng(devices=()):  # where the constructor needs values, it draws weights
        net = without_values(lambda: timm.create_model(name, **args))
    return Parts.of(net.to("meta")), layers_in_words(net)


def layers_in_words(model: nn.Module) -> dict[str, str]:
    """What each module of a model is and says of itself, by path, but for blocks and what passes its input in eval mode.

    The same layer has the same words when other code has derived a class of it: a norm that works across processes, a
    module that is sharded, a weight that is parametrized.
    """
    from timm.layers import DropPath

    blocks, found = block_paths(model), {}
    for path, m in model.named_modules():
        if module_of(f"{path}.", blocks) is None and not isinstance(m, (nn.Identity, DropoutNd, DropPath)):
            name = re.sub(
                "^(FSDP|Parametrized|Frozen)|Sync|(?<=BatchNorm)[123]d|(?<=BatchNormAct)2d", "", base_class(m).__name__)
            words = [w for w in m.extra_repr().split(", ") if not w.startswith("inplace")]
            if "BatchNorm" in name:  # the others are words of training
                words = [f"eps={getattr(m, 'eps', None)}"]
            found[path] = f"{name}({', '.join(words)})"
    return found


def _check_size(parts: Parts, tensors: Mapping[str, torch.Tensor], path: object, name: str) -> None:
    """Refuse to take memory for a model that is much larger than the weights for it, which would not fit anyway.

    Raises:
        WeightsError: It is.
    """
    own = {**parts.base, **parts.head}
    asked, there = (sum(t.numel() for t in each.values()) for each in (own, tensors))
    if asked > 2 * there + _SMALL:
        differ = _differ(own, tensors)
        raise WeightsError(
            f"{str(path)!r} asks for {name} with {asked:,} values, and the files have {there:,}, so that no memory was taken: "
            f"{', '.join(differ[:3])}; check the architecture and its arguments, or give a file with all weights")


def _differ(own: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> list[str]:
    """What `others` lacks of `own`, or has in another shape."""
    return [
        f"{k} {tuple(t.shape)} is {tuple(others[k].shape) if k in others else 'not'} there" for k, t in own.items()
        if not k.endswith("num_batches_tracked") and (k not in others or others[k].shape != t.shape)]


def without_prefix(found: Checkpoint, model: nn.Module | str | None, path: object) -> Checkpoint:
    """A checkpoint without the prefix that keeps its names from being those of a model, or of timm's model of this name."""
    import timm

    if not found.may_have_prefix or model is None:
        return found
    if isinstance(model, nn.Module):
        return found.for_model(own_tensors(model), path)
    bare = base_name(model)
    if not timm.is_model(bare):
        return found
    try:
        parts = base_parts(bare, split_options(found.model_args)[1])
    except Exception:  # arguments that timm does not take: `base_of` says so
        return found
    return found.for_model({**parts.base, **parts.head}, path)


def why_not_rebuilt(recipe: Recipe, model: nn.Module, parts: Parts) -> str:
    """Why `load` cannot build the model, which has these parts, from its file; empty where it can."""
    if recipe.architecture is None:
        return "it was not made by timm.create_model"
    args = json.loads(json.dumps(recipe.model_args))
    try:
        timms, layers = _outline(recipe.architecture, args)
    except Exception as error:
        return f"timm cannot create {recipe.architecture!r} with {args} ({error!r})"
    has_head = recipe.content == FULL or "head" in recipe.content.split("+")  # otherwise, that of the base is taken
    ours, theirs = ({**p.base, **(p.head if has_head else {})} for p in (parts, timms))
    ours = {k: t for k, t in ours.items() if isinstance(t, torch.Tensor)}
    gone = any(c.existing == "replace" for c in recipe.configs)
    lacks = [] if gone else [k for k in theirs if k not in ours and not k.endswith("num_batches_tracked")]
    differ = [k for k, t in ours.items() if k not in theirs or theirs[k].shape != t.shape] + lacks
    if not differ:
        own = layers_in_words(model)
        heads = () if has_head else head_paths(model)
        changed = [] if gone else [p for p in own.keys() | layers.keys() if own.get(p, _GONE) != layers.get(p, _GONE)
                                   and module_of(f"{p}.", heads) is None]
        if not changed:
            return ""
        first = min(changed)
        return (f"timm's {recipe.architecture} with {args} has another layer {first or type(model).__name__!r}: "
                f"{layers.get(first, _GONE)} there, {own.get(first, _GONE)} here")
    return f"timm's {recipe.architecture} with {args} has other tensors ({', '.join(differ[:3])}{', ...' * (len(differ) > 3)})"


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
            "or --model resnet50; a model that is not timm's goes in itself, as in model=net")
    bare = base_name(said)
    if not timm.is_model(bare):
        raise WeightsError(f"{str(path)!r}: {unknown_model_message(said, bare)}")
    try:
        timm.get_pretrained_cfg(bare)
    except RuntimeError as error:
        if name is None:  # another version of timm knows the tag
            return timm.models.get_arch_name(bare)
        raise WeightsError(f"{str(path)!r}: timm has no {bare!r} ({error}): leave its tag out") from error
    return bare


def of_classifier(name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of the classifier of a timm model; none where timm does not name it."""
    import timm

    cfg = timm.get_pretrained_cfg(name)
    said = None if cfg is None else cfg.classifier
    layers = (said,) if isinstance(said, str) else tuple(said or ())
    return {k: t for k, t in tensors.items() if module_of(k, layers) is not None}


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
        WeightsError: The options of the recipe lead to other blocks than the recipe names, or to none, as an injected model
            inside `net` has others.
    """
    if found.recipe is None:
        said, _ = split_options(found.model_args)
        for config in said if len(said) > 1 else (SEConfig.of(said[0], **options),):
            inject(net, config, verify=verify)
        return
    for config, inputs in zip(found.recipe.configs, found.recipe.inputs):
        prepared = prepare(net, config, inputs, type(net).__name__)
        for site in prepared.plan.sites:
            held = sum(t.numel() for k, t in found.tensors.items() if k.startswith(f"{site.path}."))
            if held and site.params > held + _SMALL:
                raise WeightsError(
                    f"{str(path)!r}: its recipe asks for {site.params:,} values in the block {site.path!r}, and the file has "
                    f"{held:,}, so that no memory was taken: save the model again")
        inside = injected_inside(net)
        try:
            apply(net, prepared, verify=verify)
        except NoSitesError as error:
            if inside is None:
                raise
            raise _other_blocks(net, inside, found.recipe, path) from error
    here, there = {s.path for i in injections_of(net) for s in i.sites}, set(found.recipe.sites)
    if here != there:
        differ = sorted(here ^ there)
        raise WeightsError(
            f"{str(path)!r}: its options lead to {len(here)} blocks in {type(net).__name__}, and it names {len(there)} "
            f"({', '.join(differ[:3])} {'are' if len(differ) > 1 else 'is'} in only one of the two): load it with the "
            "versions of timm and se_inject that saved it, or into the model that it was saved from: load(path, model=...)")


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


def has_blocks_of(net: nn.Module, found: Checkpoint, options: Mapping[str, Any], path: object) -> bool:
    """Whether a model has the blocks for a checkpoint already: it is injected, or an injected model inside it is.

    Raises:
        WeightsError: The blocks of the injected model inside it are not those of the recipe.
    """
    if injections_of(net):
        return True
    inside, recipe = injected_inside(net), found.recipe
    if inside is None or recipe is None:
        return inside is not None and not options
    here, there = set(block_paths(net)), set(recipe.sites)
    if any(c.existing == "replace" for c in recipe.configs):  # the blocks that are there go
        return False
    if here == there:
        return True
    if {f"{inside}.{site}" for site in there} & here:
        raise WeightsError(
            f"{str(path)!r}: its blocks are not those of {type(net).__name__}, but of its module {inside!r}: "
            f"load({str(path)!r}, model=model.get_submodule({inside!r}))")
    if here & there:
        raise _other_blocks(net, inside, recipe, path)
    return False


def _other_blocks(net: nn.Module, inside: str, recipe: Recipe, path: object) -> WeightsError:
    """The error for a model that holds an injected one with other blocks than those of the recipe."""
    here, there = set(block_paths(net)), set(recipe.sites)
    differ = sorted(here ^ there)
    return WeightsError(
        f"{str(path)!r}: its recipe names {len(there)} blocks, and {type(net).__name__}, in which {inside!r} is an injected "
        f"model, has {len(here)} ({', '.join(differ[:3])} {'are' if len(differ) > 1 else 'is'} in only one of the two): make "
        "that module with the options of the file, or without blocks")


def check_blocks(net: nn.Module, recipe: Recipe, path: object) -> None:
    """Refuse blocks that compute another function of the same weights.

    Raises:
        WeightsError: The injections of the model differ from the recipe in an option that shapes do not show.
    """

    def said(configs: Iterable[SEConfig]) -> set[tuple[Any, ...]]:
        return {tuple(getattr(c, name) for name in _BY_FUNCTION) for c in configs}

    modules = [("", net)] if injections_of(net) else [(f"{name}.", m) for name, m in net.named_modules()]
    injections = [(prefix, i) for prefix, m in modules for i in injections_of(m)]
    theirs, ours = said(recipe.configs), said(i.config for _, i in injections)
    equal = recipe.configs == tuple(i.written() for _, i in injections) and (
        recipe.sites == tuple(prefix + s.path for prefix, i in injections for s in i.sites))
    if theirs != ours or (len(ours) > 1 and not equal):  # with several injections, each block needs its own options
        raise WeightsError(
            f"{str(path)!r}: its blocks were made with {', '.join(_BY_FUNCTION)} = {theirs}, and those of the model with "
            f"{ours}: inject the model with the options of the file, or load the file into a model without blocks")
