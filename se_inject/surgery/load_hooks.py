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
from .parts import Parts, own_tensors
from .state import block_paths

_logger = logging.getLogger("se_inject")


def keep_absent_block(
    block: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
    missing: list[str], unexpected: list[str], errors: list[str],
) -> None:  # fmt: skip
    """Hook of a block: if no key of the block is there, it keeps its values."""
    if not any(key.startswith(prefix) for key in state_dict):
        state_dict.update({prefix + k: t for k, t in own_tensors(block).items()})


def keep_absent_base(
    model: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
    missing: list[str], unexpected: list[str], errors: list[str],
) -> None:  # fmt: skip
    """Hook of an injected model: if all keys belong to blocks, head and statistics, the rest keeps its values."""
    parts = Parts.of(model)
    found = {key[len(prefix):]: t for key, t in state_dict.items() if key.startswith(prefix)}
    if parts.is_adapter(found):
        state_dict.update({prefix + k: t for k, t in {**parts.base, **parts.head}.items() if k not in found})
    log_load(model, parts, found)


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
