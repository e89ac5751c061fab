"""Save and load: one safetensors file holds the weights and the recipe that rebuilds the model."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .config import SEConfig
from .errors import ConfigError, WeightsError
from .registry import ALIAS, PREFIX
from .surgery import Injection, block_paths, inject, unknown_model_message

FORMAT = "se_inject"
VERSION = 1
_logger = logging.getLogger("se_inject")


def save(model: nn.Module, path: str | os.PathLike[str], *, only: str | None = None,
         metadata: Mapping[str, str] | None = None) -> None:  # fmt: skip
    """Write an injected model's weights and recipe to one safetensors file. Changes nothing but the file.

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

    injection = getattr(model, "_se_injection", None)
    if not isinstance(injection, Injection):
        raise WeightsError(
            f"save({type(model).__name__}) needs an injected model, and this one has no blocks: "
            "inject() it first, or save it with safetensors.torch.save_file(model.state_dict(), path)")
    if only not in (None, "se"):
        raise WeightsError(f"only={only!r}: expected 'se' (the blocks alone) or None (everything)")
    recipe = make_recipe(model, injection)
    tensors = dict(model.state_dict())
    if only == "se":
        prefixes = tuple(f"{p}." for p in block_paths(model))
        tensors = {k: t for k, t in tensors.items() if k.startswith(prefixes)}
    recipe["content"] = "se" if only == "se" else "full"
    header = {**(metadata or {}), "format": "pt", FORMAT: json.dumps(recipe, sort_keys=True)}
    write_atomically(path, lambda temporary: save_file(_unshared(tensors), temporary, metadata=header))


def make_recipe(model: nn.Module, injection: Injection) -> dict[str, Any]:
    """What a file needs to say so that the model can be rebuilt, as JSON types.

    Raises:
        WeightsError: A timm argument of the model is no JSON value.
    """
    cfg = getattr(model, "pretrained_cfg", None)
    architecture = cfg.get("architecture") if hasattr(cfg, "get") else None
    args = {k: v for k, v in getattr(model, "_model_args", {}).items() if not k.startswith("se_")}
    args.pop("pretrained_model_args", None)
    for name in ("num_classes", "in_chans"):  # a head may have been reset after creation
        value = getattr(model, name, None)
        if isinstance(value, int):
            if name == "num_classes" or name in args:
                args[name] = value
    for key, value in args.items():
        try:
            json.dumps(value)
        except TypeError:
            raise WeightsError(
                f"the model was created with {key}={value!r}, which cannot be written to a file; "
                f"create it with a plain value, or save the object with torch.save(model, path)") from None
    config = injection.config
    if config.filter_fn is not None:
        config = _explicit(config, injection)
    return {
        "version": VERSION,
        "architecture": str(architecture).removeprefix(PREFIX) if architecture else None,
        "model_args": args,
        "config": config.to_dict(),
        "sites": [s.path for s in injection.sites],
    }


def _explicit(config: SEConfig, injection: Injection) -> SEConfig:
    """A config that names the sites that a `filter_fn` chose."""
    import dataclasses

    return dataclasses.replace(config, filter_fn=None, include=tuple(s.path for s in injection.sites), exclude=None)


def load(
    path: str | os.PathLike[str], model: nn.Module | str | None = None, *,
    base: str | os.PathLike[str] | None = None, pretrained: bool = False, **options: Any,
) -> nn.Module:  # fmt: skip
    """Rebuild an injected model from a file.

    Args:
        path: A file of `save` (full or SE-only), or base weights.
        model: Where the file does not say its architecture: a timm name, or a model, which is
            injected in place (where it is not yet) and loaded.
        base: A second file with the base weights, for an SE-only file.
        pretrained: Take timm's pretrained base weights, for an SE-only file.
        **options: Fields of `SEConfig`, for a file without a recipe; else they must not be given.

    Returns:
        The model, in eval mode.

    Raises:
        WeightsError: The file cannot be read or does not fit, or an SE-only file has no base weights.
    """
    import timm

    state, recipe = read_state_dict(path)
    if recipe is not None and options:
        raise ConfigError(
            f"{os.fspath(path)} has its own recipe, so {', '.join(sorted(options))} cannot be set; "
            "load it without options, or eject the file and inject anew")
    config = SEConfig.of(recipe["config"]) if recipe is not None else SEConfig.of(**options)
    se_only = recipe is not None and recipe["content"] == "se"
    given = isinstance(model, nn.Module)
    if not isinstance(model, nn.Module):
        name = model or (recipe["architecture"] if recipe else None) or state.architecture
        if not name:
            raise WeightsError(
                f"{os.fspath(path)} does not say its architecture: load(path, model='resnet50'), or give the model")
        if not timm.is_model(name):
            raise WeightsError(f"{os.fspath(path)}: {unknown_model_message(name, name)}")
        args = dict(recipe["model_args"]) if recipe else infer_model_args(name, state.tensors)
        if se_only and base is None and not pretrained:
            raise WeightsError(
                f"{os.fspath(path)} holds the blocks alone: add base=FILE, pretrained=True, or model=a model with weights")
        model = timm.create_model(base_name(name), pretrained=pretrained, **args)
    if not hasattr(model, "_se_injection"):
        if base is not None:
            load_tensors(model, read_state_dict(base)[0].tensors, base)
        inject(model, config)
    elif base is not None:
        load_tensors(model, read_state_dict(base)[0].tensors, base)
    load_tensors(model, state.tensors, path)
    return model if given else model.eval()


def base_name(name: str) -> str:
    """A timm name without the prefix of its twin."""
    return name.removeprefix(PREFIX).removeprefix(ALIAS)


def load_tensors(model: nn.Module, tensors: Mapping[str, torch.Tensor], source: object) -> None:
    """Load strictly, or raise and leave the model as it was.

    Raises:
        WeightsError: Keys are missing or unknown, or shapes differ.
    """
    own = model.state_dict()
    wrong = [
        f"{k}: {tuple(t.shape)} in the file, {tuple(own[k].shape)} in the model"
        for k, t in tensors.items() if k in own and own[k].shape != t.shape]
    if wrong:
        raise WeightsError(f"{source}: {len(wrong)} tensors have another shape: {'; '.join(wrong[:3])}")
    missing, unexpected = _resolve(model, [k for k in own if k not in tensors], [k for k in tensors if k not in own])
    if missing or unexpected:
        parts = [f"{len(keys)} {word} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
                 for word, keys in (("missing", missing), ("unknown", unexpected)) if keys]
        raise WeightsError(
            f"{source} does not fit {type(model).__name__}: {' and '.join(parts)} of its {len(own)} tensors; "
            "check the architecture, num_classes and the options of the injection")
    model.load_state_dict(dict(tensors), strict=True)


def _resolve(model: nn.Module, missing: list[str], unexpected: list[str]) -> tuple[list[str], list[str]]:
    """Take from the missing keys what may be missing: whole blocks, and the whole base under SE-only weights."""
    blocks = {f"{p}.": [] for p in block_paths(model)}
    own = model.state_dict()
    owner_of: dict[str, str] = {}
    for prefix in blocks:
        for key in own:
            if key.startswith(prefix):
                owner_of[key] = prefix
    total: dict[str, int] = defaultdict(int)
    for prefix in owner_of.values():
        total[prefix] += 1
    lost: dict[str, int] = defaultdict(int)
    for key in missing:
        if key in owner_of:
            lost[owner_of[key]] += 1
    absent = {p for p, n in lost.items() if n == total[p]}
    left = [k for k in missing if owner_of.get(k) not in absent]
    base = [k for k in own if k not in owner_of]
    if base and len(absent) < len(total) and set(base) <= set(left):
        left = [k for k in left if k in owner_of]
        base_loaded = 0
    else:
        base_loaded = len(base) - sum(k in own and k not in owner_of for k in left)
    if not left and not unexpected and blocks:
        loaded = sum(n for p, n in total.items() if p not in absent)
        kept = sum(total[p] for p in absent)
        _logger.info("%d base tensors and %d SE tensors loaded, %d SE tensors keep their values",
                     base_loaded, loaded, kept)
    return left, unexpected


def relax_missing(model: nn.Module, incompatible: Any) -> None:
    """Hook behind `load_state_dict` of an injected model: base weights and SE-only weights load strictly."""
    missing = incompatible.missing_keys
    prefix = _common_prefix(model, missing)
    left, _ = _resolve(model, [k[len(prefix):] for k in missing], list(incompatible.unexpected_keys))
    missing[:] = [prefix + k for k in left]


def _common_prefix(model: nn.Module, missing: list[str]) -> str:
    """What a wrapper, such as DDP, puts before the model's own keys."""
    if not missing:
        return ""
    for key in model.state_dict():
        if missing[0].endswith(key) and (len(missing[0]) == len(key) or missing[0][-len(key) - 1] == "."):
            prefix = missing[0][: len(missing[0]) - len(key)]
            if all(k.startswith(prefix) for k in missing):
                return prefix
    return ""


def write_atomically(path: str | os.PathLike[str], write: Any) -> None:
    """Call `write` with a temporary name beside `path`, then rename it to `path`.

    Raises:
        WeightsError: The folder does not exist or cannot be written.
    """
    target = Path(path)
    try:
        fd, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        os.close(fd)
    except OSError as error:
        raise WeightsError(f"cannot write {target}: {error.strerror}; choose a folder that exists and is writable") from error
    try:
        umask = os.umask(0)
        os.umask(umask)
        write(temporary)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's are for the owner alone
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _unshared(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous tensors that share no memory, as safetensors wants them."""
    seen: set[int] = set()
    out = {}
    for key, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        out[key] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    return out


class StateDict:
    """Tensors of a checkpoint and what it says of its model."""

    def __init__(self, tensors: dict[str, torch.Tensor], architecture: str | None, model_args: dict[str, Any],
                 metadata: dict[str, str]) -> None:  # fmt: skip
        self.tensors = tensors
        self.architecture = architecture
        self.model_args = model_args
        self.metadata = metadata


def read_state_dict(path: str | os.PathLike[str]) -> tuple[StateDict, dict[str, Any] | None]:
    """Read a checkpoint: safetensors, a timm training checkpoint, or a folder with timm's ``config.json``.

    Pickles are read with ``weights_only=True``. Of a training checkpoint the EMA weights are taken where
    there are some; prefixes of DDP and torch.compile are removed.

    Returns:
        The tensors, and the recipe where the file has one.

    Raises:
        WeightsError: The file is missing, damaged, or no checkpoint.
    """
    file = Path(path)
    if file.is_dir():
        return _read_folder(file)
    if not file.is_file():
        raise WeightsError(f"there is no file {file}: give a .safetensors, a .pth, or a folder with config.json")
    if _is_safetensors(file):
        return _read_safetensors(file)
    return _read_pickle(file)


def _is_safetensors(file: Path) -> bool:
    with open(file, "rb") as f:
        start = f.read(9)
    return file.suffix == ".safetensors" or (len(start) == 9 and start[8:9] == b"{")


def _read_safetensors(file: Path) -> tuple[StateDict, dict[str, Any] | None]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as f:
            metadata = dict(f.metadata() or {})
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file} is no readable safetensors file: {error}; copy or download it again") from error
    recipe = check_recipe(metadata[FORMAT], file) if FORMAT in metadata else None
    architecture = recipe["architecture"] if recipe else metadata.get("architecture")
    return StateDict(_clean(tensors), architecture, dict(recipe["model_args"]) if recipe else {}, metadata), recipe


def check_recipe(text: str, source: object) -> dict[str, Any]:
    """Parse and check the recipe of a file. It names options and a timm model, and nothing in it is run.

    Raises:
        WeightsError: It is no recipe of a known version.
    """
    try:
        recipe = json.loads(text)
    except ValueError as error:
        raise WeightsError(f"{source}: its se_inject recipe is no JSON ({error}); save the model again") from error
    if not isinstance(recipe, dict) or recipe.get("version") != VERSION:
        found = recipe.get("version") if isinstance(recipe, dict) else type(recipe).__name__
        raise WeightsError(
            f"{source}: recipe version {found!r}, and this se_inject reads {VERSION}; install the version that wrote it")
    expected = {"version": int, "architecture": (str, type(None)), "model_args": dict, "config": dict, "sites": list,
                "content": str}
    for key, kind in expected.items():
        if not isinstance(recipe.get(key), kind):  # type: ignore[arg-type]
            raise WeightsError(f"{source}: its recipe has no valid {key!r} ({recipe.get(key)!r}); save the model again")
    unknown = recipe.keys() - expected.keys()
    if unknown or recipe["content"] not in ("full", "se"):
        raise WeightsError(f"{source}: its recipe has what this version does not know: {sorted(unknown) or recipe['content']}")
    try:
        SEConfig.of(recipe["config"])
    except ConfigError as error:
        raise WeightsError(f"{source}: its recipe is not valid: {error}") from error
    return recipe


def _read_pickle(file: Path) -> tuple[StateDict, dict[str, Any] | None]:
    import argparse

    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise WeightsError(
            f"{file} cannot be read as weights ({type(error).__name__}: {str(error).splitlines()[0]}); "
            "se_inject runs no pickled code: save it with torch.save(model.state_dict(), path)") from error
    if not isinstance(checkpoint, Mapping):
        raise WeightsError(f"{file} holds a {type(checkpoint).__name__}, expected a state dict or a training checkpoint")
    tensors: Any = checkpoint
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(checkpoint.get(key), Mapping):
            tensors = checkpoint[key]
            break
    bad = [k for k, v in tensors.items() if not isinstance(v, torch.Tensor)]
    if bad or not tensors:
        raise WeightsError(
            f"{file} holds no state dict: {', '.join(map(repr, bad[:3])) or 'it is empty'}; "
            "expected tensors by name, or a timm training checkpoint")
    arch = checkpoint.get("arch")
    args = checkpoint.get("args")
    model_args = dict(getattr(args, "model_kwargs", None) or {})
    return StateDict(_clean(tensors), arch if isinstance(arch, str) else None, model_args, {}), None


def _read_folder(folder: Path) -> tuple[StateDict, dict[str, Any] | None]:
    config = folder / "config.json"
    if not config.is_file():
        raise WeightsError(f"{folder} has no config.json; give a folder that timm saved, or a weights file")
    try:
        said = json.loads(config.read_text())
        architecture = said["architecture"]
        model_args = dict(said.get("model_args") or {})
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{config} is no timm config ({error!r}): expected JSON with 'architecture'") from error
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            state, recipe = read_state_dict(folder / name)
            if recipe is None:
                state.architecture = architecture
                state.model_args = {**model_args, **{k: said[k] for k in ("num_classes",) if k in said}}
            return state, recipe
    raise WeightsError(f"{folder} has no model.safetensors and no pytorch_model.bin")


def _clean(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the prefixes that DDP and torch.compile leave."""
    out = {}
    for key, tensor in tensors.items():
        for prefix in ("module.", "_orig_mod.", "module."):
            key = key.removeprefix(prefix)
        out[key] = tensor
    return out


def infer_model_args(name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """`num_classes` and `in_chans` of the named model's weights, read off their shapes."""
    import timm

    cfg = timm.get_pretrained_cfg(base_name(name)) or object()
    args: dict[str, Any] = {}
    classifier = getattr(cfg, "classifier", None)
    first = classifier[0] if isinstance(classifier, (list, tuple)) and classifier else classifier
    weight = tensors.get(f"{first}.weight")
    if weight is not None:
        if weight.shape[0] != getattr(cfg, "num_classes", None):
            args["num_classes"] = int(weight.shape[0])
    elif first and any(isinstance(k, str) for k in tensors):
        args["num_classes"] = 0
    stem = getattr(cfg, "first_conv", None)
    first_conv = stem[0] if isinstance(stem, (list, tuple)) and stem else stem
    weight = tensors.get(f"{first_conv}.weight")
    if weight is not None and weight.dim() == 4 and weight.shape[1] != cfg.input_size[0]:  # type: ignore[union-attr]
        args["in_chans"] = int(weight.shape[1])
    return args
