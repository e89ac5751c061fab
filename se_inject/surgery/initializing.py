"""`init_weights` of an injected timm model: it draws all layers that it finds, and those of blocks come back to their start."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..blocks.start import watch
from .state import block_paths


def init_weights(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The model's own `init_weights`, after which the blocks that it has drawn are as at their start."""
    cls: Any = type(model)
    restore = watch([model.get_submodule(path) for path in block_paths(model)])
    result = cls.init_weights(model, *args, **kwargs)
    restore()
    return result
