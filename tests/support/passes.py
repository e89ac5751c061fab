"""Memory passed over, counted."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
_NO_PASS = {
    _aten.detach.default, _aten.as_strided.default, _aten.set_.source_Storage, _aten.set_.source_Storage_storage_offset}


class Passes(TorchDispatchMode):
    """Counts the bytes that operators read of tensors with values, and those of new ones that they make."""

    def __init__(self):
        super().__init__()
        self.copied = self.other = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        size = max((t.numel() * t.element_size() for t in tree_leaves((args, kwargs, out))
                    if isinstance(t, torch.Tensor) and not t.is_meta), default=0)
        if func is torch.ops.aten.copy_.default:
            self.copied += size if args[0] is not args[1] else 0
        elif func is torch.ops.aten._foreach_copy_.default:
            self.copied += sum(t.numel() * t.element_size() for t in args[0])
        elif not func.is_view and func not in _NO_PASS and not getattr(out, "is_meta", False):
            self.other += size
        return out


def nbytes(model):
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())
