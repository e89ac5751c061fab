"""The layer of a block, for layer-wise learning rates (timm's ``layer_decay``)."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from .state import block_paths


def group_matcher(model: nn.Module, coarse: bool = False) -> Any:
    """The model's own `group_matcher`, in which a block belongs to the layer before it.

    timm counts parameters that the matcher does not know to the head, and trains them at the head's rate.
    """
    cls: Any = type(model)
    own = cls.group_matcher(model, coarse=coarse)
    if not isinstance(own, dict):
        return own
    blocks = block_paths(model)
    specs: dict[str, list[Any]] = {
        key: list(spec) if isinstance(spec, (tuple, list)) else [(spec, None)]
        for key, spec in own.items() if spec}
    changed = dict(own)
    before: str | None = None  # the parameter of the base before the current one
    for name, _ in model.named_parameters():
        path = next((p for p in blocks if name.startswith(f"{p}.")), None)
        if path is None:
            before = name
        elif before is not None and _match(specs, name) is None:
            found = _match(specs, before)
            if found is not None:
                key, groups = found
                specs[key].append((f"^{re.escape(path)}\\.", groups))
                changed[key] = specs[key]
    return changed


def _match(specs: dict[str, list[Any]], name: str) -> tuple[str, tuple[Any, ...]] | None:
    """The entry of a matcher that a parameter belongs to, and its numbers in that entry."""
    for key, entry in specs.items():
        for pattern, suffix in entry:
            r = re.match(pattern, name)
            if r:
                return key, (*(int(g) for g in r.groups() if g is not None), *(suffix or ()))
    return None
