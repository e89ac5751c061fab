"""Write weights without losing the old ones: beside the target, then renamed; large models in shards."""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch

from ..errors import ConfigError, WeightsError

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
        WeightsError: The folder does not exist or cannot be written, or an entry is no tensor or has no values.
        ConfigError: `metadata` or `max_shard_size` has a bad value.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    other = [k for k, t in tensors.items() if not isinstance(t, torch.Tensor)]
    if other:
        raise WeightsError(f"{len(other)} entries of the state dict are no tensors ({', '.join(other[:3])}), and a safetensors "
                           "file takes only tensors: save the object with torch.save(model, path)")
    strange = [k for k, v in metadata.items() if not (isinstance(k, str) and isinstance(v, str))]
    if strange:
        raise ConfigError(
            f"metadata[{strange[0]!r}] is {metadata[strange[0]]!r}, and the header takes only strings: write str(...)")
    on_meta = [k for k, t in tensors.items() if t.is_meta]
    if on_meta:
        raise WeightsError(f"{len(on_meta)} tensors are on the meta device and have no values ({', '.join(on_meta[:3])}): "
                           "load weights into the model first")
    header = {**metadata, "format": "pt"}
    target = Path(path)
    if target.is_dir():
        raise WeightsError(f"cannot write {str(path)!r}, which is a folder: give a file in it, such as model.safetensors")
    index = index_of(target)
    plain = unshared(tensors)
    try:
        split = split_torch_state_dict_into_shards(plain, max_shard_size=max_shard_size)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"max_shard_size={max_shard_size!r}: expected a number of bytes, or a size such as '5GB'") from error
    if not split.is_sharded:
        write_atomically(target, functools.partial(save_file, plain, metadata=header))
        index.unlink(missing_ok=True)
        _remove_shards(target, keep=())
        return
    save, count = os.urandom(8).hex(), len(split.filename_to_tensors)
    names = {name: f"{_stem(target)}-{save}-{i:05}-of-{count:05}.safetensors"
             for i, name in enumerate(split.filename_to_tensors, 1)}
    for name, keys in split.filename_to_tensors.items():
        shard = {key: plain[key] for key in keys}
        write_atomically(target.with_name(names[name]), functools.partial(save_file, shard, metadata=header))
    text = json.dumps({
        "metadata": {**split.metadata, **header},
        "weight_map": {key: names[name] for key, name in split.tensor_to_filename.items()}}, indent=2)
    write_atomically(index, lambda file: Path(file).write_text(text))
    target.unlink(missing_ok=True)  # the single file of an earlier save, which `load` would prefer to the index
    _remove_shards(target, keep=names.values())


def _stem(target: Path) -> str:
    return target.name.removesuffix(".safetensors")


def _remove_shards(target: Path, keep: Collection[str]) -> None:
    """Remove the shards of earlier saves under this name, also of interrupted ones."""
    ours = re.compile(re.escape(_stem(target)) + r"-[0-9a-f]{16}-\d{5}-of-\d{5}\.safetensors")
    for file in target.parent.iterdir():
        if ours.fullmatch(file.name) and file.name not in keep:
            file.unlink(missing_ok=True)


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
    """The same tensors, contiguous and without shared memory, as safetensors requires."""
    seen: set[int] = set()
    out = {}
    for key, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        out[key] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    return out


def write_atomically(path: str | os.PathLike[str], write: Callable[[str], object]) -> None:
    """Call `write` with a temporary name beside `path`, then rename it to `path`.

    Raises:
        WeightsError: The folder does not exist or cannot be written.
    """
    target = Path(path)
    try:
        fd, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        os.close(fd)
    except OSError as error:
        raise WeightsError(
            f"cannot write {str(path)!r} ({error.strerror}): choose a folder that exists and is writable") from error
    try:
        write(temporary)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp gives rights to the owner alone
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
