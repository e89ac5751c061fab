"""Read files of weights: their tensors, and what they say of their model."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
import pickle
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import WeightsError
from ..surgery.prefixes import common_prefixes, likely_prefix
from ..undo import entered
from .recipe import KEY, Recipe, checked_args, described_args, parsed
from .writing import INDEX, index_of

_logger = logging.getLogger("se_inject")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, and what the file says of their model.

    Attributes:
        tensors: The tensors of the file.
        architecture: A timm name, which may be that of a twin; None if the file does not say it.
        model_args: Arguments of `timm.create_model`.
        recipe: The recipe in a file of `se_inject.save`, or in the folder of a model that was injected; None in others.
        prefix: What was taken off all names.
        metadata: The strings in the header of a safetensors file.
    """

    tensors: dict[str, torch.Tensor]
    architecture: str | None = None
    model_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    recipe: Recipe | None = None
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    prefix: str = ""

    def for_model(self, own: Collection[str], source: object) -> Checkpoint:
        """The same, without the prefix of its names that keeps them from being those of a model, `own`.

        A file of `save` has none. The caller checks each name.
        """
        full = [self.prefix + key for key in self.tensors]
        prefix = self.prefix if self.recipe is not None else likely_prefix(full, own, self.prefix)
        if prefix == self.prefix:
            return self
        _logger.info("%s: the prefix %r is taken off all names", source, prefix)
        tensors = _without(prefix, dict(zip(full, self.tensors.values())))
        return dataclasses.replace(self, tensors=tensors, prefix=prefix)

    def renamed(self, names: Mapping[str, str]) -> Checkpoint:
        """The same with other names, by those of the file, but for names that two tensors would have."""
        new = {key: names[key] for key in self.tensors if key in names and names[key] not in self.tensors}
        return dataclasses.replace(self, tensors={new.get(key, key): t for key, t in self.tensors.items()}) if new else self

    @property
    def may_have_prefix(self) -> bool:
        """Whether its names share one."""
        return self.recipe is None and (bool(self.prefix) or len(common_prefixes(self.tensors)) > 1)


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a safetensors file, a PyTorch file, or a folder with the ``config.json`` of timm or transformers.

    Pickles are read with ``weights_only=True``, which runs no code. A training checkpoint gives its EMA weights, if it has
    some. A file in a folder that `save_pretrained` of an injected model has written has the recipe in the config beside it.
    The prefixes of DDP and `torch.compile` are removed; others tell themselves from names of children where the model
    is known (`Checkpoint.for_model`). Tensors are mapped from the file: what nobody uses, such as
    the state of an optimizer, takes no memory.

    Raises:
        WeightsError: The file is missing, damaged, or no checkpoint.
    """
    try:
        file = Path(path)
        os.path.realpath(file)
        is_folder = file.is_dir()
    except (TypeError, ValueError, OSError) as error:
        raise WeightsError(f"cannot read {path!r} ({error}): give the path of a file or a folder") from error
    if is_folder:
        return _read_folder(file)
    found, config = _read_file(file), file.parent / "config.json"
    if found.recipe is not None or file.name not in _IN_FOLDERS:
        return found
    said: Any = None
    with contextlib.suppress(OSError, ValueError):  # none, or not transformers'
        said = parsed(config.read_text())
    recipe = Recipe.from_config(said[KEY], config) if isinstance(said, dict) and KEY in said else None
    return dataclasses.replace(found, recipe=recipe)


_IN_FOLDERS = ("model.safetensors", f"model{INDEX}", "pytorch_model.bin")  # names in the folders of timm and transformers


def _read_file(file: Path) -> Checkpoint:
    """Read one file, or the shards that stand for it.

    Raises:
        WeightsError: It is missing, damaged, or no checkpoint.
    """
    if file.name.endswith(INDEX):
        return _read_shards(file)
    for index in (index_of(file), index_of(Path(os.path.realpath(file)))):  # `save` follows a link
        if not file.is_file() and index.is_file():
            return _read_shards(index)
    if not file.is_file():
        raise WeightsError(
            f"there is no file {str(file)!r}: give a .safetensors file, a .pth file, or a folder with config.json")
    try:
        with open(file, "rb") as f:
            start = f.read(9)
    except OSError as error:
        raise WeightsError(f"cannot read {str(file)!r}: {error}") from error
    is_safetensors = file.suffix == ".safetensors" or start[8:9] == b"{"  # an 8-byte length, then JSON
    return _described(*_tensors_and_metadata(file), file) if is_safetensors else _read_pickle(file)


def _tensors_and_metadata(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """What a safetensors file holds.

    Raises:
        WeightsError: It cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}, dict(f.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{file} is no readable safetensors file ({error}): copy or download it again") from error


def _described(tensors: dict[str, torch.Tensor], metadata: dict[str, str], file: Path) -> Checkpoint:
    """The tensors, with what the header says of their model.

    Raises:
        WeightsError: The header is not valid.
    """
    recipe = Recipe.from_json(metadata[KEY], file) if KEY in metadata else None
    if recipe is not None:
        return Checkpoint(tensors, recipe.architecture, recipe.model_args, recipe, metadata)  # `save` wrote no prefixes
    architecture = metadata.get("architecture")
    args = described_args(metadata, file) if architecture else {}
    prefix = _wrappers_prefix(tensors)
    return Checkpoint(_without(prefix, tensors), architecture, args, metadata=metadata, prefix=prefix)


def _read_shards(index: Path) -> Checkpoint:
    """Read the files that a Hugging Face index names. They are in the folder of the index.

    Raises:
        WeightsError: The index is damaged, or a shard or a tensor is missing.
    """
    try:
        said = parsed(index.read_text())
        files = {str(key): Path(name) for key, name in said["weight_map"].items()}
        metadata = {str(k): v for k, v in (said.get("metadata") or {}).items() if isinstance(v, str)}
        if any(name.name != str(name) for name in files.values()):
            raise ValueError("it names a file in another folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{index} is no index of shards ({error!r}): expected JSON in which 'weight_map' gives the file of each tensor"
        ) from error
    shards: dict[Path, dict[str, torch.Tensor]] = {}
    for name in files.values():
        if not (index.parent / name).is_file():
            raise WeightsError(f"{index}: its shard {str(name)!r} is not there: copy all files of the model")
        if name not in shards:
            shards[name] = _tensors_and_metadata(index.parent / name)[0]
    missing = [key for key, name in files.items() if key not in shards[name]]
    if missing:
        raise WeightsError(f"{index}: {len(missing)} tensors are not in the shards that it names ({', '.join(missing[:3])}): "
                           "the shards belong to another index; copy all files of the model")
    return _described({key: shards[name][key] for key, name in files.items()}, metadata, index)


def _read_pickle(file: Path) -> Checkpoint:
    """Read a PyTorch file: a state dict, or a training checkpoint that holds one.

    Raises:
        WeightsError: It holds neither, or needs code to be run.
    """
    try:
        loaded = _unpickled(file)
    except Exception as error:
        raise WeightsError(
            f"{file} cannot be read as weights ({type(error).__name__}: {str(error).partition(chr(10))[0]}); no pickled code "
            "is run: write the file again with torch.save(model.state_dict(), path)") from error
    if not isinstance(loaded, Mapping):
        raise WeightsError(f"{file} holds a {type(loaded).__name__}, and no weights: write a state dict, as "
                           "torch.save(model.state_dict(), path) does, or a training checkpoint")
    tensors = state_dict_in(loaded)
    other = [k for k, v in tensors.items() if not (isinstance(k, str) and isinstance(v, torch.Tensor))]
    if other or not tensors:
        raise WeightsError(
            f"{file} holds no state dict ({', '.join(map(repr, other[:3])) or 'it is empty'}): "
            "write tensors by name, as torch.save(model.state_dict(), path) does, or a timm training checkpoint")
    arch, training = loaded.get("arch"), loaded.get("args")  # the arguments of timm's train.py
    given = getattr(training, "model_kwargs", None)
    args = {name: getattr(training, option, None) for option, name in _OF_TRAINING.items()}
    args = {name: value for name, value in args.items() if isinstance(value, (str, int, float))}
    args |= checked_args(given, file) if isinstance(given, Mapping) else {}
    prefix = _wrappers_prefix(tensors)
    return Checkpoint(_without(prefix, tensors), arch if isinstance(arch, str) else None, args, prefix=prefix)


_OF_TRAINING = {"gp": "global_pool", "bn_eps": "bn_eps", "bn_momentum": "bn_momentum"}  # which train.py gives to the model too


def state_dict_in(loaded: Mapping[str, Any]) -> Mapping[str, Any]:
    """The weights in a training checkpoint, the averaged ones if it has some. A state dict is returned as it is."""
    keys = ("state_dict_ema", "model_ema", "state_dict", "model")
    return next((loaded[key] for key in keys if isinstance(loaded.get(key), Mapping)), loaded)


class _Unknown(dict[Any, Any]):
    """What stands for an object of another library, such as a hyperparameter in a checkpoint of Lightning: it does nothing."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __new__(cls, *args: object, **kwargs: object) -> _Unknown:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__()

    def __setstate__(self, state: object) -> None:
        pass


def _unpickled(file: Path) -> Any:
    """The content of a PyTorch file. No code in it is run: `_Unknown` stands for objects that are no weights."""
    known: list[Any] = [argparse.Namespace]  # timm's train.py saves its arguments

    def load() -> Any:
        with entered(torch.serialization.safe_globals(known)):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))

    try:
        return load()
    except pickle.UnpicklingError:
        if not zipfile.is_zipfile(file):
            raise
        unknown = set(torch.serialization.get_unsafe_globals_in_checkpoint(file)) - {"argparse.Namespace"}
        known += [(type("_Unknown", (_Unknown,), {}), name) for name in sorted(unknown)]
        loaded = load()
        if isinstance(loaded, _Unknown):  # a whole model, say
            raise
        return loaded


def _read_folder(folder: Path) -> Checkpoint:
    """Read a folder of timm's `save_for_hf` or of Hugging Face's `save_pretrained`: ``config.json``, and the weights.

    Raises:
        WeightsError: The config is not valid, or there are no weights.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise WeightsError(
            f"{folder} has no config.json: give a folder that timm or save_pretrained has written, or a file of weights")
    try:
        said = parsed(config.read_text())
        is_timms = isinstance(said.get("architecture"), str)
        model_args = dict(said.get("model_args") or {}) if is_timms else {}
        if not is_timms and not {"model_type", "architectures", KEY} & said.keys():
            raise KeyError("architecture")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{config} is no config of timm's or transformers' ({error!r}): write JSON with 'architecture'") from error
    model_args = checked_args(model_args, config)
    if is_timms and isinstance(said.get("num_classes"), int):
        model_args.setdefault("num_classes", said["num_classes"])
    recipe = Recipe.from_config(said[KEY], config) if KEY in said else None
    for name in _IN_FOLDERS:
        if (folder / name).is_file():
            found = _read_file(folder / name)
            if found.recipe is not None:
                return found
            if recipe is not None:
                return dataclasses.replace(found, recipe=recipe)
            return dataclasses.replace(found, architecture=said["architecture"] if is_timms else None, model_args=model_args)
    raise WeightsError(f"{folder} has no model.safetensors and no pytorch_model.bin: add the weights under one of these names")


def _wrappers_prefix(tensors: Mapping[str, torch.Tensor]) -> str:
    """The prefix of DDP, of `torch.compile`, or of both, if all names have it."""
    known = {"module", "_orig_mod"}
    return [p for p in common_prefixes(tensors) if known.issuperset(p.split(".")[:-1])][-1]


def _without(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key[len(prefix):]: t for key, t in tensors.items()}
