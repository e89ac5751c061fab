"""Write tensors to a safetensors file; large models in shards."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import ConfigError, WeightsError
from ..private import safetensors_dtypes
from .replacing import destination, replace_files, status_of

INDEX = ".safetensors.index.json"


def index_of(file: Path) -> Path:
    """The path of the index of a model in shards that was saved as `file`."""
    return file.with_name(file.name.removesuffix(".safetensors") + INDEX)


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str],
    max_shard_size: int | str = "5GB",
) -> None:  # fmt: skip
    """Write tensors to `path`, or, if they are larger than `max_shard_size`, to shards beside it with Hugging Face's index.

    An interruption at any moment leaves either the old save or the new one, whole. Each save gives its shards new names,
    so that an index never finds shards of another save. The index is renamed last, and files that it does not name are
    removed after that.

    Raises:
        WeightsError: The file cannot be written, or there is no tensor, or an entry is no tensor, has no values, or is of a
            kind that safetensors does not know; or `path` is the name of an index.
        ConfigError: `metadata` or `max_shard_size` has a bad value, or shards are needed for a name without the suffix.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    _check_tensors(tensors)
    if not tensors:
        raise WeightsError(f"there are no tensors to write to {str(path)!r}")
    strange = [k for k, v in metadata.items() if not (isinstance(k, str) and isinstance(v, str))]
    if strange:
        raise ConfigError(
            f"metadata[{strange[0]!r}] is {metadata[strange[0]]!r}, and the header takes only strings: write str(...)")
    header = {**metadata, "format": "pt"}
    target = destination(path)
    if target.name.endswith(INDEX):
        raise WeightsError(f"{str(path)!r} is the name of an index: write {target.name.removesuffix(INDEX)}.safetensors")
    index = index_of(target)
    shard_names = re.compile(re.escape(_stem(target)) + r"-[0-9a-f]{16}-\d{5}-of-\d{5}\.safetensors")
    names = "|".join((re.escape(target.name), re.escape(index.name), shard_names.pattern))
    plain = unshared(tensors)
    try:
        split = split_torch_state_dict_into_shards(plain, max_shard_size=max_shard_size)
        if isinstance(max_shard_size, bool) or not (isinstance(max_shard_size, str) or max_shard_size > 0):
            raise ValueError(max_shard_size)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"max_shard_size={max_shard_size!r}: expected a number of bytes, or a size such as '5GB'") from error
    has_suffix = target.name != _stem(target)  # `model` and `model.safetensors` would share an index
    if split.is_sharded and not has_suffix:
        raise ConfigError(
            f"{str(path)!r} is above max_shard_size={max_shard_size!r}: for shards write {target.name}.safetensors")
    files: list[tuple[Path, Callable[[str], object]]] = [(target, functools.partial(save_file, plain, metadata=header))]
    kept: Collection[str] = ()
    obsolete = index
    if split.is_sharded:
        save, count = os.urandom(8).hex(), len(split.filename_to_tensors)
        shards = {name: f"{_stem(target)}-{save}-{i:05}-of-{count:05}.safetensors"
                  for i, name in enumerate(split.filename_to_tensors, 1)}
        files = [
            (target.with_name(shards[name]), functools.partial(save_file, {k: plain[k] for k in keys}, metadata=header))
            for name, keys in split.filename_to_tensors.items()]
        text = json.dumps({
            "metadata": {**split.metadata, **header},
            "weight_map": {key: shards[name] for key, name in split.tensor_to_filename.items()}}, indent=2)
        files.append((index, lambda file: Path(file).write_text(text)))
        kept = shards.values()
        obsolete = target  # the single file of an earlier save, which `load` would prefer to the index

    def clean_up() -> None:
        if not has_suffix:
            return
        if obsolete is target or _is_of_shards(index, shard_names):
            obsolete.unlink(missing_ok=True)
        for file in target.parent.iterdir():  # shards of earlier saves, also of interrupted ones
            if shard_names.fullmatch(file.name) and file.name not in kept:
                file.unlink(missing_ok=True)

    replace_files(files, path, names, status_of(target, index), clean_up)


def _is_of_shards(index: Path, names: re.Pattern[str]) -> bool:
    """Whether an index is of shards by these names, and not one of another program."""
    try:
        files = json.loads(index.read_text())["weight_map"].values()
        return all(names.fullmatch(file) for file in files)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def _check_tensors(tensors: Mapping[str, Any]) -> None:
    """Refuse what a safetensors file cannot hold.

    Raises:
        WeightsError: There is such an entry; the message names it.
    """
    known = safetensors_dtypes()
    pickled = "save the object with torch.save(model, path)"
    kinds: dict[tuple[str, str], list[str]] = {}
    for key, t in tensors.items():
        why = None
        if not isinstance(t, torch.Tensor):
            why = f"no tensors, but {type(t).__name__}", pickled
        elif is_lazy(t):
            why = "lazy and have no values", "run the model once first"
        elif t.is_meta:
            why = "on the meta device and have no values", "load weights into the model first"
        elif t.is_nested or t.layout is not torch.strided or t.is_quantized:
            why = "nested, sparse or quantized tensors", f"{pickled}, or make them dense"
        elif is_traceable_wrapper_subclass(t):
            why = f"{type(t).__name__}s, which keep their values in other tensors", pickled
        elif t.dtype not in known:
            why = f"of {t.dtype}", f"{pickled}, or convert them"
        elif not has_memory(t):
            why = "without memory and have no values", "load weights into the model first"
        if why is not None:
            kinds.setdefault(why, []).append(key)
    for (what, instead), keys in kinds.items():
        raise WeightsError(
            f"{len(keys)} of {len(tensors)} entries of the state dict are {what} ({', '.join(map(str, keys[:3]))}), and a "
            f"safetensors file does not hold such: {instead}")


def _stem(target: Path) -> str:
    return target.name.removesuffix(".safetensors")


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether a tensor has values: not so a lazy or a fake tensor, or one whose storage was freed."""
    if is_traceable_wrapper_subclass(tensor):  # its memory is that of other tensors
        return True
    try:
        storage = tensor.untyped_storage()
        return tensor.numel() == 0 or (storage.nbytes() > 0 and storage.data_ptr() != 0)
    except (RuntimeError, ValueError):
        return False


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor. Works in a torch without torch.distributed."""
    return hasattr(tensor, "full_tensor")


def gathered(tensors: Mapping[str, torch.Tensor], keep: bool) -> dict[str, torch.Tensor]:
    """Gather sharded tensors to the CPU, one after another; return nothing if `keep` is False. All ranks have to call this."""
    out = {}
    for key, tensor in tensors.items():
        full = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
        if keep:
            out[key] = full.detach().cpu()
    return out


def unshared(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors, contiguous and without shared memory or pending signs, as safetensors requires."""
    seen: set[int] = set()
    out = {}
    for key, tensor in tensors.items():
        tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        out[key] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    return out
