"""What `load_state_dict` of an injected model accepts: weights without the blocks, and weights of the blocks alone.

A hook on the model and one on each block run before the load. They add the model's own tensors for the keys that may be
absent, so that a strict load keeps those tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..blocks.identity import is_identity
from ..blocks.start import fitted, is_on_meta, settle, started
from .parts import Parts, own_tensors
from .prefixes import certain_prefix
from .state import block_paths

_logger = logging.getLogger("se_inject")
_ASSIGN = "assign_to_params_buffers"  # what `load_state_dict(assign=True)` tells the hooks


def keep_absent_block(
    block: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
    missing: list[str], unexpected: list[str], errors: list[str],
) -> None:  # fmt: skip
    """Hook of a block: if no key of the block is there, it keeps its values. If it has none, the keys are missing."""
    assign = local_metadata.get(_ASSIGN, False)
    if any(key.startswith(prefix) for key in state_dict):
        if assign:
            settle(block)
    elif not (assign and is_on_meta(block)):
        state_dict.update({prefix + k: t for k, t in own_tensors(block).items()})


def keep_absent_base(
    model: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
    missing: list[str], unexpected: list[str], errors: list[str],
) -> None:  # fmt: skip
    """Hook of an injected model: if all keys belong to blocks, head and statistics, the rest keeps its values.

    A prefix of all keys comes off where they then fit the model.

    With ``assign=True``, blocks that the file lacks move to the device and dtype of the loaded base.
    """
    parts = Parts.of(model)
    if not prefix:
        drop_prefix(state_dict, parts)
    assign = local_metadata.get(_ASSIGN, False)
    found = {  # torch.distributed.checkpoint adds the model's own tensors for what a file lacks
        key[len(prefix):]: t for key, t in state_dict.items() if key.startswith(prefix) and not (assign and t.is_meta)}
    if parts.is_adapter(found):
        state_dict.update({prefix + k: t for k, t in {**parts.base, **parts.head}.items() if k not in found})
    log_load(model, parts, found)
    if assign:
        for path, keys in parts.blocks.items():
            if not any(k in found for k in keys):
                new = _assigned(model.get_submodule(path), *_device_and_dtype(path, parts, found))
                state_dict.update({f"{prefix}{path}.{k}": t for k, t in new.items()})


def drop_prefix(state_dict: dict[str, Any], parts: Parts) -> None:
    """Rename the tensors of a state dict, in place, where all have a prefix without which they fit the model."""
    prefix = certain_prefix(state_dict, parts)
    if prefix:
        _logger.info("the prefix %r is taken off all %d names", prefix, len(state_dict))
        tensors = {key[len(prefix):]: t for key, t in state_dict.items()}
        state_dict.clear()
        state_dict.update(tensors)


def _device_and_dtype(path: str, parts: Parts, loaded: Mapping[str, torch.Tensor]) -> tuple[torch.device, torch.dtype]:
    """The device and dtype of what is loaded around the block at `path`: of tensors that had its dtype, first in its owner."""
    first = parts.se[parts.blocks[path][0]]
    owner = "".join(path.rpartition(".")[:2])
    own = {**parts.base, **parts.head}
    near = sorted((k for k in own if k in loaded and own[k].is_floating_point()), key=lambda k: not k.startswith(owner))
    same = next((loaded[k] for k in near if own[k].dtype == first.dtype), None)
    device = loaded[near[0]].device if near else first.device
    return (device, first.dtype) if same is None else (same.device, same.dtype)


def _assigned(block: nn.Module, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of a block on a device and of a dtype; one without values gets those of its start."""
    own = own_tensors(block)
    new = own_tensors(started(block, device, dtype)) if is_on_meta(block) and device.type != "meta" else own
    return {k: fitted(t, own[k]).to(device, dtype if t.is_floating_point() else None) for k, t in new.items()}


def log_load(model: nn.Module, parts: Parts, found: Mapping[str, torch.Tensor]) -> None:
    """Log how many tensors of base and blocks `found` loads, and how many keep their values."""
    fits = {k for k, t in parts.everything().items() if k in found and found[k].shape == t.shape}
    kept = (parts.base.keys() | parts.head.keys()) - found.keys() if parts.is_adapter(found) else ()
    of_se = len(fits & parts.se.keys())
    absent = parts.se.keys() - found.keys()
    at_identity = sum(len(keys) for path, keys in parts.blocks.items()
                      if absent.issuperset(keys) and is_identity(model.get_submodule(path)))
    counts = ((len(fits) - of_se, "base", "loaded"), (len(kept), "base", "kept"), (of_se, "SE", "loaded"),
              (at_identity, "SE", "at identity"), (len(absent) - at_identity, "SE", "kept"))
    _logger.info(", ".join(f"{n} {of} tensors {what}" for n, of, what in counts if n))


def register_hooks(model: nn.Module) -> None:
    """Register the hooks on an injected model and on each of its blocks, once."""
    for module, hook in ((model, keep_absent_base), *((model.get_submodule(p), keep_absent_block) for p in block_paths(model))):
        if not any(_function_of(h) is hook for h in module._load_state_dict_pre_hooks.values()):
            module.register_load_state_dict_pre_hook(hook)


def remove_hooks(model: nn.Module) -> None:
    """Take the hooks off a model and all its modules."""
    for m in model.modules():
        settle(m)
        for key, h in list(m._load_state_dict_pre_hooks.items()):
            if _function_of(h) in (keep_absent_base, keep_absent_block):
                del m._load_state_dict_pre_hooks[key]


def has_other_hooks(module: nn.Module) -> bool:
    """Whether a module has a hook before `load_state_dict` that is none of these."""
    return any(
        _function_of(h) not in (keep_absent_base, keep_absent_block) for h in module._load_state_dict_pre_hooks.values())


def _function_of(registered: Any) -> Any:
    """The function that torch wrapped when it was registered as a hook."""
    return getattr(registered, "hook", registered)
