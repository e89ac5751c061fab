"""Which tensors of an injected model belong to the base, to the head, and to the blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import torch
from torch import nn

from .state import block_paths, head_paths


@dataclasses.dataclass(frozen=True)
class Parts:
    """The tensors of an injected model, by part and name: the parameters and buffers themselves, no copies.

    Attributes:
        base: Tensors of neither the head nor a block.
        head: Tensors of the classifier.
        se: Tensors of the blocks.
        blocks: Names of the tensors of each block, by the path of the block.
    """

    base: dict[str, torch.Tensor]
    head: dict[str, torch.Tensor]
    se: dict[str, torch.Tensor]
    blocks: dict[str, list[str]]

    @classmethod
    def of(cls, model: nn.Module) -> Parts:
        parts = cls({}, {}, {}, {path: [] for path in block_paths(model)})
        heads = dict.fromkeys(head_paths(model))
        for key, tensor in own_tensors(model).items():
            path = _module_of(key, parts.blocks)
            if path is not None:
                parts.blocks[path].append(key)
                parts.se[key] = tensor
            else:
                (parts.base if _module_of(key, heads) is None else parts.head)[key] = tensor
        return parts

    def everything(self) -> dict[str, torch.Tensor]:
        return {**self.base, **self.head, **self.se}

    def is_partial(self, keys: Collection[str]) -> bool:
        """Whether `keys` are tensors of blocks, of the whole head, or of both alone, to be loaded over a base."""
        others = {key for key in keys if key not in self.se}
        return bool(keys) and (not others or others == self.head.keys())

    def is_adapter(self, keys: Collection[str]) -> bool:
        """Whether `keys` are partial and have some of a block. A head alone may also be the rest of a broken file."""
        return self.is_partial(keys) and any(key in self.se for key in keys)

    def absent_from_blocks(self, keys: Collection[str]) -> list[str]:
        """Names of tensors that are not among `keys`, while others of the same block are."""
        broken = (names for names in self.blocks.values() if any(name in keys for name in names))
        return [name for names in broken for name in names if name not in keys]


def own_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and buffers that the state dict of `module` holds, by its names: themselves, no copies."""
    return dict(module.state_dict(keep_vars=True))


def _module_of(key: str, paths: Collection[str]) -> str | None:
    """The path, among `paths`, of the module that holds the tensor of this name."""
    path = key
    while path:
        path = path.rpartition(".")[0]
        if path in paths:
            return path
    return None
