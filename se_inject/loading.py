"""Which keys a state dict may lack: all of a block's, or the whole base."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .errors import WeightsError

_logger = logging.getLogger("se_inject")


def keep_absent_block(
    block: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
    missing: list[str], unexpected: list[str], errors: list[str],
) -> None:  # fmt: skip
    """Before a block loads: where no key of it is there, it keeps its values."""
    if not any(key.startswith(prefix) for key in state_dict):
        state_dict.update({prefix + k: t for k, t in _tensors(block).items()})


def keep_absent_base(
    model: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
    missing: list[str], unexpected: list[str], errors: list[str],
) -> None:  # fmt: skip
    """Before an injected model loads: where only keys of blocks are there, the base keeps its values."""
    of_base, of_blocks = _split(model)
    found = [key[len(prefix):] for key in state_dict if key.startswith(prefix)]
    se = sum(key in of_blocks for key in found)
    base = sum(key in of_base for key in found)
    if se and se == len(found):
        state_dict.update({prefix + k: t for k, t in of_base.items()})
        _logger.info("%d SE tensors loaded, %d base tensors kept", se, len(of_base))
    else:
        _logger.info("%d base tensors loaded, %d SE tensors loaded, %d SE tensors kept", base, se, len(of_blocks) - se)


def load_strictly(model: nn.Module, tensors: Mapping[str, torch.Tensor], source: object) -> None:
    """Load all of `tensors` in place, or raise and leave the model as it was.

    Raises:
        WeightsError: Keys are missing or unknown, shapes differ, or values are NaN.
    """
    of_base, of_blocks = _split(model)
    own = {**of_base, **of_blocks}
    wrong = [
        f"{k}: {tuple(t.shape)} in the file, {tuple(own[k].shape)} in the model"
        for k, t in tensors.items() if k in own and own[k].shape != t.shape]
    if wrong:
        raise WeightsError(
            f"{source}: {len(wrong)} of {len(tensors)} tensors have another shape ({'; '.join(wrong[:3])}): "
            "check the architecture, num_classes, in_chans and the options of the injection")
    se_only = bool(tensors) and all(k in of_blocks for k in tensors)
    missing = [] if se_only else [
        k for k in of_base if k not in tensors and not k.endswith("num_batches_tracked")]  # torch can do without
    for path in block_paths(model):
        keys = [f"{path}.{k}" for k in model.get_submodule(path).state_dict()]
        if any(k in tensors for k in keys):
            missing += [k for k in keys if k not in tensors]
    unknown = [k for k in tensors if k not in own]
    if missing or unknown:
        parts = [f"{len(keys)} {word} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
                 for word, keys in (("missing", missing), ("unknown", unknown)) if keys]
        raise WeightsError(
            f"{source} does not fit {type(model).__name__}: {' and '.join(parts)} of its {len(own)} tensors; "
            "check the architecture, num_classes and the options of the injection")
    bad = [k for k, t in tensors.items() if t.is_floating_point() and t.isnan().any()]
    if bad:
        raise WeightsError(f"{source}: {len(bad)} tensors hold NaN ({', '.join(bad[:3])}); save a sound model")
    model.load_state_dict(dict(tensors), strict=True)


def block_paths(model: nn.Module) -> list[str]:
    """Dotted names of the injected blocks, in the order of the model's modules."""
    return [
        f"{path}.{edit.slot}" if path else edit.slot
        for path, m in model.named_modules() if "_se_edits" in m.__dict__ for edit in m.__dict__["_se_edits"].edits]


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """What `module`'s state dict holds, by the same names, but the very parameters and buffers."""
    everything = {
        **dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers(remove_duplicate=False))}
    return {k: everything.get(k, t) for k, t in module.state_dict().items()}


def _split(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    prefixes = tuple(f"{p}." for p in block_paths(model))
    of_base: dict[str, torch.Tensor] = {}
    of_blocks: dict[str, torch.Tensor] = {}
    for key, tensor in _tensors(model).items():
        (of_blocks if prefixes and key.startswith(prefixes) else of_base)[key] = tensor
    return of_base, of_blocks


def register_hooks(model: nn.Module) -> None:
    """Let an injected model, and each of its blocks, load weights that know nothing of the blocks, or of the rest."""
    if not any(hook_of(h) is keep_absent_base for h in model._load_state_dict_pre_hooks.values()):
        model.register_load_state_dict_pre_hook(keep_absent_base)
    for path in block_paths(model):
        block = model.get_submodule(path)
        if not any(hook_of(h) is keep_absent_block for h in block._load_state_dict_pre_hooks.values()):
            block.register_load_state_dict_pre_hook(keep_absent_block)


def remove_hooks(model: nn.Module) -> None:
    """Take `register_hooks`' hook off a model whose blocks go with their own."""
    for m in model.modules():
        for key, h in list(m._load_state_dict_pre_hooks.items()):
            if hook_of(h) in (keep_absent_base, keep_absent_block):
                del m._load_state_dict_pre_hooks[key]


def hook_of(registered: Any) -> Any:
    """The function that torch wrapped when it registered a hook."""
    return getattr(registered, "hook", registered)
