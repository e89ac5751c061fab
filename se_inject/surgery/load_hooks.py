"""TODO"""

from __future__ import annotations

import contextvars
import dataclasses
import logging
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from ..blocks.identity import is_identity
from .state import block_paths, head_paths

_logger = logging.getLogger("se_inject")


def keep_absent_block(
    block: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
    missing: list[str], unexpected: list[str], errors: list[str],
) -> None:  # fmt: skip
    """Before a block loads: where no key of it is there, it keeps its values."""
    if not any(key.startswith(prefix) for key in state_dict):
        state_dict.update({prefix + k: t for k, t in tensors_of(block).items()})


def keep_absent_base(
    model: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
    missing: list[str], unexpected: list[str], errors: list[str],
) -> None:  # fmt: skip
    """Before an injected model loads: where only keys of blocks, or of blocks and the head, are there, the base keeps
    its values. Says what is loaded."""
    known = at_hand.get()
    parts = known[1] if known is not None and known[0] is model else Parts.of(model)
    found = {key[len(prefix):]: t for key, t in state_dict.items() if key.startswith(prefix)}
    kept = {k: t for k, t in {**parts.base, **parts.head}.items() if k not in found} if parts.is_adapter(found) else {}
    state_dict.update({prefix + k: t for k, t in kept.items()})
    fits = {k for k, t in parts.everything().items() if k in found and found[k].shape == t.shape}
    of_se = len(fits & parts.se.keys())
    absent = parts.se.keys() - found.keys()
    resting = sum(len(keys) for path, keys in parts.blocks.items()
                  if absent.issuperset(keys) and is_identity(model.get_submodule(path)))
    counts = ((len(fits) - of_se, "base", "loaded"), (len(kept), "base", "kept"), (of_se, "SE", "loaded"),
              (resting, "SE", "at identity"), (len(absent) - resting, "SE", "kept"))
    _logger.info(", ".join(f"{n} {of} tensors {what}" for n, of, what in counts if n))


@dataclasses.dataclass(frozen=True)
class Parts:
    """An injected model's tensors, by name: the very parameters and buffers, of the blocks, the head and the rest.

    `blocks` has the names of each block's tensors, by its path.
    """

    base: dict[str, torch.Tensor]
    head: dict[str, torch.Tensor]
    se: dict[str, torch.Tensor]
    blocks: dict[str, list[str]]

    @classmethod
    def of(cls, model: nn.Module) -> Parts:
        parts = cls({}, {}, {}, {path: [] for path in block_paths(model)})
        heads = dict.fromkeys(head_paths(model))
        for key, tensor in tensors_of(model).items():
            path = _holder(key, parts.blocks)
            if path is not None:
                parts.blocks[path].append(key)
                parts.se[key] = tensor
            else:
                (parts.base if _holder(key, heads) is None else parts.head)[key] = tensor
        return parts

    def everything(self) -> dict[str, torch.Tensor]:
        return {**self.base, **self.head, **self.se}

    def is_partial(self, keys: Collection[str]) -> bool:
        """Whether `keys` are those of blocks, of the head, or of both alone, to be loaded over a base."""
        others = {key for key in keys if key not in self.se}
        return bool(keys) and (not others or others == self.head.keys())

    def is_adapter(self, keys: Collection[str]) -> bool:
        """The same, but with blocks: a head alone may as well be what is left of a broken file."""
        return self.is_partial(keys) and any(key in self.se for key in keys)


def _holder(key: str, paths: Collection[str]) -> str | None:
    """Which of the modules at `paths` has the tensor of this name."""
    path = key
    while path:
        path = path.rpartition(".")[0]
        if path in paths:
            return path
    return None


at_hand: contextvars.ContextVar[tuple[nn.Module, Parts] | None] = contextvars.ContextVar("se_inject_parts", default=None)


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """What `module`'s state dict holds, by the same names, but the very parameters and buffers."""
    return dict(module.state_dict(keep_vars=True))


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
