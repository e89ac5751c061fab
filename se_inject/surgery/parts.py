"""Which tensors of an injected model belong to the base, to the head, and to the blocks."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection

import torch
from torch import nn

from ..dataflow.layers import is_norm
from .state import block_paths, head_paths

_COUNTER = "num_batches_tracked"  # of a batch norm; its outputs do not depend on it


@dataclasses.dataclass(frozen=True)
class Parts:
    """The tensors of an injected model, by part and name: the parameters and buffers themselves, no copies.

    Attributes:
        base: Tensors of neither the head nor a block.
        head: Tensors of the classifier.
        se: Tensors of the blocks.
        stats: Those of base and head that a forward in train mode may write: their buffers, such as running means.
        blocks: Names of the tensors of each block, by the path of the block.
        norms: The parameters of the base's norms, their scales and shifts.
    """

    base: dict[str, torch.Tensor]
    head: dict[str, torch.Tensor]
    se: dict[str, torch.Tensor]
    blocks: dict[str, list[str]]
    stats: dict[str, torch.Tensor]
    norms: dict[str, torch.Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> Parts:
        parts = cls({}, {}, {}, {path: [] for path in block_paths(model)}, {}, {})
        buffers = {name for name, b in model.named_buffers(remove_duplicate=False) if b.is_floating_point()}
        heads = dict.fromkeys(head_paths(model))
        norms = norm_parameters(model)
        for key, tensor in own_tensors(model).items():
            path = module_of(key, parts.blocks)
            if path is not None:
                parts.blocks[path].append(key)
                parts.se[key] = tensor
            else:
                (parts.base if module_of(key, heads) is None else parts.head)[key] = tensor
                if key in buffers or key.endswith(_COUNTER):
                    parts.stats[key] = tensor
                elif key in norms and key in parts.base:
                    parts.norms[key] = tensor
        return parts

    def everything(self) -> dict[str, torch.Tensor]:
        return {**self.base, **self.head, **self.se}

    def is_partial(self, keys: Collection[str]) -> bool:
        """Whether `keys` are tensors of blocks, of the whole head, all norms or all statistics, to be loaded over a base.

        Counters of batches may be absent, as everywhere.
        """
        others = {key for key in keys if key not in self.se}
        chosen = itertools.product((True, False), repeat=3)
        wholes = ({*itertools.chain(*itertools.compress((self.head, self.norms, self.stats), c))} for c in chosen)
        return bool(keys) and any(
            others <= whole and all(key.endswith(_COUNTER) for key in whole - others) for whole in wholes)

    def is_adapter(self, keys: Collection[str]) -> bool:
        """Whether `keys` are partial and have some of a block. A head alone may also be the rest of a broken file."""
        return self.is_partial(keys) and any(key in self.se for key in keys)

    def absent_from_blocks(self, keys: Collection[str]) -> list[str]:
        """Names of tensors that are not among `keys`, while others of the same block are."""
        broken = (names for names in self.blocks.values() if any(name in keys for name in names))
        return [name for names in broken for name in names if name not in keys]


def norm_parameters(model: nn.Module) -> set[str]:
    """The names of the parameters of a model's norms."""
    return {
        f"{path}.{name}" if path else name for path, m in model.named_modules(remove_duplicate=False) if is_norm(m)
        for name, p in m.named_parameters(recurse=False) if p is not None}


def own_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and buffers that the state dict of `module` holds, by its names: themselves, no copies."""
    return dict(module.state_dict(keep_vars=True))


def module_of(key: str, paths: Collection[str]) -> str | None:
    """The path, among `paths`, of the module that holds the tensor of this name."""
    path = key
    while path:
        path = path.rpartition(".")[0]
        if path in paths:
            return path
    return None
