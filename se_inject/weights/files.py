"""The doors `save` and `load`: one safetensors file holds the weights and the recipe that rebuilds the model."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..capture.snapshot import all_or_nothing
from ..errors import ConfigError, WeightsError
from ..private import names_in_files
from ..surgery.parts import Parts, own_tensors
from ..surgery.refusals import injected_inside, refuse, refuse_optimized
from ..surgery.state import forget_replaced, injections_of
from ..timm_names import PREFIX, base_name, split_options
from . import digest
from .reading import Checkpoint, read_checkpoint
from .rebuild import (
    base_architecture,
    base_of,
    check_blocks,
    has_blocks_of,
    infer_model_args,
    inject_as_said,
    of_classifier,
    why_not_rebuilt,
    without_prefix,
)
from .recipe import FULL, KEY, PARTS, Recipe, content_of, parts_in_words
from .strict import load_strictly
from .writing import gathered, is_sharded, write_safetensors

_logger = logging.getLogger("se_inject")


def save(
    model: nn.Module, path: str | os.PathLike[str], *, only: str | Sequence[str] | None = None,
    metadata: Mapping[str, str] | None = None, max_shard_size: int | str = "5GB",
) -> None:  # fmt: skip
    """Write the weights and the recipe of an injected model to a safetensors file. Does not change the model.

    The file is written beside `path` and then renamed, so that an interrupted save loses nothing. A link is followed, and a
    file that is there keeps its mode and owner. A model larger than
    `max_shard_size` becomes several files with Hugging Face's index, ``<path without suffix>.safetensors.index.json``;
    `load` also finds them by `path`. The weights of a model that ``fully_shard`` has sharded are gathered: call `save` on
    all ranks; the first rank writes.

    A file of blocks alone has a digest of each tensor of the base, and `load` logs a warning if the base is another one.
    A model that `load` cannot build by itself, such as one whose head has several layers, is written with a warning.

    Args:
        model: An injected model, which DDP or `torch.compile` may wrap.
        path: The file to write, by convention ``*.safetensors``.
        only: ``"se"`` writes the blocks alone, ``"head"`` the classifier, ``"norms"`` the scales and shifts of the base's
            norms, ``"stats"`` the norms' statistics, which move in train mode; a tuple such as ``("se", "head")`` writes
            several. `load` puts them on top of any base weights.
        metadata: More strings for the header of the file; not changed.
        max_shard_size: A number of bytes, or a size such as ``"5GB"``.

    Raises:
        WeightsError: The model has no blocks or no head, its recipe has a value that is not JSON, `path` cannot be
            written, or a tensor has no values or is of a kind that safetensors does not know.
        ConfigError: `only`, `metadata` or `max_shard_size` has a bad value.

    Example:
        >>> import pathlib, tempfile
        >>> import se_inject, timm
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = pathlib.Path(folder.name, "se.safetensors")
        >>> se_inject.save(timm.create_model("se_inject/test_resnet"), path, only="se")
        >>> path.stat().st_size < 50_000
        True
        >>> folder.cleanup()
    """
    model = unwrapped(model)
    refuse_optimized(model, "save")
    injections = injections_of(model)
    if not injections:
        inside = injected_inside(model)
        if inside is not None:
            raise WeightsError(
                f"save({type(model).__name__}): its module {inside!r} is the injected model: "
                f"write save(model.get_submodule({inside!r}), path)")
        raise WeightsError(
            f"save({type(model).__name__}): this model has no blocks; inject() it first, "
            "or write it with safetensors.torch.save_file(model.state_dict(), path)")
    wanted = [only] if isinstance(only, str) else list(only) if isinstance(only, (list, tuple, set, frozenset)) else []
    if only is not None and (not wanted or any(name not in [*PARTS] for name in wanted)):
        raise ConfigError(
            f"only={only!r}: expected 'se' (the blocks), 'head' (the classifier), 'norms' (scales and shifts of the base's "
            "norms), 'stats' (the statistics of norms), several of them, or None (everything)")
    tensors = own_tensors(model)
    parts = Parts.of(model)
    header: dict[str, str] = {}
    if wanted:
        kept = {key for name in wanted for key in getattr(parts, name)}
        tensors = {key: t for key, t in tensors.items() if key in kept}
    if not tensors:
        lacks = " and no ".join(dict(PARTS, head="classifier", norms="norms with parameters")[name] for name in wanted)
        raise WeightsError(f"save({type(model).__name__}, only={only!r}): this model has no {lacks}; write only='se'")
    recipe = Recipe.of(model, injections, content_of(wanted))
    why = why_not_rebuilt(recipe, model, parts)
    if why:
        _logger.log(
            logging.INFO if recipe.architecture is None else logging.WARNING, "load(%r) cannot build this model by itself, "
            "because %s: load(%r, model=...) takes a model that your code has made", str(path), why, str(path))
    if "se" in wanted:
        header[digest.KEY] = digest.digests({k: t for k, t in digest.of_the_base(parts).items() if k not in tensors})
    if any(is_sharded(t) for t in tensors.values()):
        first = torch.distributed.get_rank() == 0
        tensors = gathered(tensors, keep=first)
        if not first:
            return
    write_safetensors(path, tensors, {**(metadata or {}), **header, KEY: recipe.to_json()}, max_shard_size)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP, `torch.compile` or timm's EMA."""
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
    """Build an injected model from files of weights, or load them into a given model, in place.

    A warning in the log names the tensors that differ if the file was saved over another base.

    Args:
        path: A file of `save` (the whole model or parts), or any checkpoint of the base weights. A prefix of all its names,
            such as ``model.`` in those of Lightning, is taken off if the names then are the model's.
        model: A timm name, for a file that does not say it. Or a model: it is injected, unless it or a model inside it has
            the blocks already, and the files are loaded into it.
        base: A second file with the base weights, if `path` lacks them.
        head: A further file, which may be a whole model. Its classifier is taken instead of all others.
        pretrained: Take timm's pretrained weights for the base, if `path` lacks them.
        model_args: Arguments of `timm.create_model` that the file does not say, such as ``img_size``; not changed.
        device: Device of a model that is built here; None is torch's default.
        dtype: Data type of a model that is built here; None is torch's default, whatever the file has.
        **options: Fields of `SEConfig`, for a file without a recipe.

    Returns:
        The model. A model that is built here is in eval mode; a given model keeps its mode.

    Raises:
        WeightsError: A file cannot be read or does not fit, or no file has the base weights. A given model is then
            unchanged.
        ConfigError: An option is wrong, or an argument contradicts the file or the given model.

    Example:
        >>> import pathlib, tempfile
        >>> import se_inject, timm
        >>> folder = tempfile.TemporaryDirectory()
        >>> path = pathlib.Path(folder.name, "model.safetensors")
        >>> se_inject.save(timm.create_model("se_inject/test_resnet", se_ratio=0.25, num_classes=10), path)
        >>> model = se_inject.load(path)
        >>> model.training, model.num_classes, model.layer1[0].se.fc1.out_channels
        (False, 10, 8)
        >>> folder.cleanup()
    """
    return load_found(
        read_checkpoint(path), path, model, base=base, head=head, pretrained=pretrained, model_args=model_args,
        device=device, dtype=dtype, **options)


def load_found(
    found: Checkpoint, path: str | os.PathLike[str], model: nn.Module | str | None = None, *,
    base: str | os.PathLike[str] | None = None, head: str | os.PathLike[str] | None = None, pretrained: bool = False,
    model_args: Mapping[str, Any] | None = None, device: torch.device | str | None = None,
    dtype: torch.dtype | None = None, verify: bool = False, **options: Any,
) -> nn.Module:  # fmt: skip
    """`load`, for a `path` that is already read as `found`."""
    _check_kinds(model, model_args, device, dtype)
    found = dataclasses.replace(found, model_args={**found.model_args, **(model_args or {})})
    _check_request(found, path, model, base, pretrained, model_args, device, dtype, options)
    given = isinstance(model, nn.Module)
    below, over = (None if file is None else read_checkpoint(file) for file in (base, head))
    said = found.architecture if model is None else model
    found = without_prefix(found, said, path)
    below = below and without_prefix(below, said, base)
    over = over and without_prefix(over, said, head)
    if below is not None:
        _check_base(below, base, found, path, model)
    if over is not None and model is None and not _of_one_architecture(found, over):
        raise WeightsError(
            f"{str(path)!r} is of {found.architecture}, and head={str(head)!r} of {over.architecture}: give the head of "
            f"{found.architecture}, or confirm with model={found.architecture!r}")
    top = {} if over is None else over.tensors
    if isinstance(model, nn.Module):
        net = model
    else:
        name = base_architecture(found, model, path)
        if below is not None and found.model_args.get("num_classes") == 0:  # the blocks stood on a base without a classifier
            heads = of_classifier(name, below.tensors)
            below = dataclasses.replace(below, tensors={k: t for k, t in below.tensors.items() if k not in heads})
        everything = {**(below.tensors if below else {}), **found.tensors, **(of_classifier(name, top) or top)}
        sizes = infer_model_args(name, everything) if below or top else {}
        args = {**found.model_args, **sizes, **(model_args or {})}  # classes and channels as in the weights that win
        net = base_of(dataclasses.replace(found, tensors=everything, model_args=args), model, path, pretrained=pretrained)
        if device is not None or dtype is not None:
            try:
                net.to(device=device, dtype=dtype)
            except (RuntimeError, AssertionError) as error:  # there is no such device
                raise ConfigError(f"load({str(path)!r}, device={device!r}): {str(error).splitlines()[0]}") from error
    with all_or_nothing(net):
        if not has_blocks_of(net, found, options, path):
            inject_as_said(net, found, options, path, verify=verify)
            if found.recipe is None and not str(said).startswith(PREFIX):
                _check_replaced(net, found, path)
        elif found.recipe is not None:
            check_blocks(net, found.recipe, path)
        parts = Parts.of(net)
        found = found.for_model(parts.everything(), path).renamed(names_in_files(net))  # again, for a file of blocks alone
        full = found.recipe is not None and found.recipe.content == FULL
        if full and parts.se and not parts.se.keys() & found.tensors.keys():
            raise WeightsError(
                f"{str(path)!r} names {len(parts.blocks)} blocks in its config, and has no weights of theirs: a model that "
                "from_pretrained had made without blocks was saved there; take the folder of the injected model")
        tensors = _joined(net, parts, found, below, base, top, head)
        if not given and not pretrained and parts.is_partial(tensors):  # the base that was built has random weights
            files = ", ".join(repr(str(p)) for p in (path, base, head) if p is not None)
            raise WeightsError(
                f"there are no weights of the base in {files}, only weights of blocks or head: add base=FILE with them, "
                "pretrained=True, or model=a model with weights")
        load_strictly(net, parts, tensors, path, given)
        if not given and not parts.is_partial(tensors):
            forget_replaced(net)
    for file, source in ((found, path), (below, base), (over, head)):
        if file is not None and digest.KEY in file.metadata:
            chosen = parts.head if top and file is not over else {}  # the user asked for this head
            digest.warn_of_another_base(file.metadata[digest.KEY], parts, tensors, source, chosen)
    return net if given else net.eval()


def _check_kinds(model: object, model_args: object, device: object, dtype: object) -> None:
    """
    Raises:
        ConfigError: An argument of `load` is of another kind than it takes.
        TraceError: The model is wrapped or scripted.
    """
    if isinstance(model, nn.Module):
        refuse(model, "load", optimized=True, traced=False)
    elif not (model is None or (isinstance(model, str) and model)):
        raise ConfigError(f"model={model!r}: expected a timm name or a model, a torch.nn.Module")
    if not (model_args is None or (isinstance(model_args, Mapping) and all(isinstance(k, str) for k in model_args))):
        raise ConfigError(f"model_args={model_args!r}: expected a dict of arguments of timm.create_model, by name")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"dtype={dtype!r}: expected a floating point type, such as torch.float16")
    try:
        torch.device(device if device is not None else "cpu")  # type: ignore[call-overload]
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device={device!r}: {str(error).splitlines()[0]}") from error


def _check_request(
    found: Checkpoint, path: object, model: nn.Module | str | None, base: object, pretrained: bool,
    model_args: Mapping[str, Any] | None, device: object, dtype: object, options: dict[str, Any],
) -> None:  # fmt: skip
    """Refuse arguments of `load` that contradict the file, or that would be ignored.

    Raises:
        ConfigError: There is such an argument.
        WeightsError: No argument leads to weights of the base.
    """
    recipe = found.recipe
    said = sorted(key for key in model_args or {} if key.startswith("se_"))
    if recipe is not None and said:
        raise ConfigError(
            f"{str(path)!r} has its own recipe, so that {', '.join(said)} cannot be set; load it without, or load its base "
            "weights into a model and inject that")
    if recipe is None and options and len(split_options(found.model_args)[0]) > 1:
        raise ConfigError(
            f"{str(path)!r} says several injections, so that {', '.join(sorted(options))} cannot be set: load it without")
    if recipe is not None and options:
        raise ConfigError(
            f"{str(path)!r} has its own recipe, so that {', '.join(sorted(options))} cannot be set; "
            "load it without options, or load its base weights into a model and inject that")
    if isinstance(model, nn.Module):
        unused = {"pretrained": pretrained, "model_args": model_args, "device": device is not None, "dtype": dtype is not None,
                  "options": injections_of(model) and options}
        if any(unused.values()):
            raise ConfigError(
                f"load({str(path)!r}, model={type(model).__name__}): {', '.join(k for k, v in unused.items() if v)} cannot "
                "be set for a model that is already made: create the model with them, or give its timm name")
    elif recipe is not None and recipe.content != FULL and base is None and not pretrained:
        raise WeightsError(
            f"{str(path)!r} holds the {parts_in_words(recipe.content)} alone: add base=FILE, pretrained=True, or model=a model "
            f"with weights; in the command, `se-inject merge {path} --base FILE -o FULL`")


def _check_replaced(net: nn.Module, found: Checkpoint, path: object) -> None:
    """
    Raises:
        WeightsError: The weights may be those of attention that was replaced, or those of the blocks in its place.
    """
    replaced = [key for injection in injections_of(net) for site in injection.sites for key in site.replaces]
    if either := [key for key in replaced if key in found.tensors and key in own_tensors(net)]:
        raise WeightsError(
            f"{str(path)!r} does not say whether {either[0]} is a weight of the base's own attention or of the block that "
            "replaces it: load the base into a model and write inject(model, existing='replace'); for weights of blocks, give "
            "a file of save, or name the model as in model='se_inject/...'")


def _check_base(
    below: Checkpoint, base: object, found: Checkpoint, path: object, model: nn.Module | str | None
) -> None:  # fmt: skip
    """Check the file of the base weights, `below`.

    Raises:
        WeightsError: It adds nothing, or belongs to another architecture.
    """
    if below.tensors.keys() <= found.tensors.keys():
        raise WeightsError(
            f"{str(path)!r} has all {len(below.tensors)} tensors of base={str(base)!r}, so that none would be taken from "
            "there: leave base out, or give a file of save(only=...) instead of the first")
    if model is None and not _of_one_architecture(found, below):
        raise WeightsError(
            f"{str(path)!r} is of {found.architecture}, and base={str(base)!r} of {below.architecture}, in which equal names "
            f"may mean something else: give the base of {found.architecture}, or confirm with model={found.architecture!r}")


def _joined(
    net: nn.Module, parts: Parts, found: Checkpoint, below: Checkpoint | None, base: object,
    top: Mapping[str, torch.Tensor], head: object,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The tensors of all files: those of the base, over them those of the file, over them the classifier of `head`.

    Raises:
        WeightsError: `head` lacks some of the classifier, or blocks would come from a base file with other options.
    """
    lacks = [key for key in parts.head if key not in top and not key.endswith("num_batches_tracked")]
    if top and (lacks or not parts.head):
        raise WeightsError(
            f"{str(head)!r} has no tensors of {'a' if len(lacks) == len(parts.head) else 'the whole'} classifier: "
            f"expected {', '.join(parts.head) or 'none, because the model has no classifier: leave head out'}")
    under = {} if below is None else below.tensors
    if below is not None and below.recipe is not None and (under.keys() - found.tensors.keys()) & parts.se.keys():
        check_blocks(net, below.recipe, base)
    return {**under, **found.tensors, **{k: t for k, t in top.items() if k in parts.head}}


def _of_one_architecture(*files: Checkpoint) -> bool:
    """Whether all files that say their architecture say the same one."""
    from timm.models import get_arch_name

    return len({get_arch_name(base_name(file.architecture)) for file in files if file.architecture}) <= 1
