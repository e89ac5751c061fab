"""An `nn.Sequential` with blocks among its children, in which the author's positions stay.

Authors iterate a Sequential and index it by number (VGG's intermediate features). A block is a child with a name, but
without a position: at a position stands the author's child, and a call of it also calls the blocks behind it.
"""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..capture.snapshot import set_class
from ..errors import SEInjectError
from .generated_class import generated, new_of
from .state import base_class, edits_of, set_edits, slots_of


class Gated:
    """An author's child with the blocks around it, to be called. Its attributes are the child's, to read and to set."""

    def __init__(self, child: nn.Module, before: list[nn.Module], behind: list[nn.Module]) -> None:
        self.__dict__["_child"] = child
        self.__dict__["_before"] = before
        self.__dict__["_behind"] = behind

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        for m in self._before:
            x = m(x)
        x = self._child(x)
        for m in self._behind:
            x = m(x)
        return x

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_child"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_child"], name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return Gated, (self._child, self._before, self._behind)

    def __deepcopy__(self, memo: dict[int, Any]) -> Gated:  # not the child's
        return Gated(*copy.deepcopy((self._child, self._before, self._behind), memo))


def _positions(self: nn.Module) -> list[list[str]]:
    """The children's names by position: the author's own child, and the blocks behind it; in the first, also before it."""
    slots = slots_of(self)
    groups: list[list[str]] = [[]]
    for name in self._modules:
        if name not in slots and any(n not in slots for n in groups[-1]):
            groups.append([])
        groups[-1].append(name)
    return groups


def _at(self: nn.Module, names: list[str]) -> Any:
    slots = slots_of(self)
    (own,) = (i for i, name in enumerate(names) if name not in slots)
    children: list[Any] = [self._modules[name] for name in names]
    return Gated(children[own], children[:own], children[own + 1:]) if len(children) > 1 else children[0]


def _iter(self: nn.Module) -> Iterator[Any]:
    return iter([_at(self, names) for names in _positions(self)])


def _len(self: nn.Module) -> int:
    return len(_positions(self))


def _getitem(self: nn.Module, idx: Any) -> Any:
    groups = _positions(self)
    if not isinstance(idx, slice):
        return _at(self, groups[operator.index(idx)])
    names = [name for group in groups[idx] for name in group]
    cls: Any = type(self)
    part: nn.Module = base_class(self)(OrderedDict((name, self._modules[name]) for name in names))
    edits = edits_of(self)
    assert edits is not None
    left = tuple(edit for edit in edits.edits if edit.slot in names)
    if left:
        set_edits(part, dataclasses.replace(edits, edits=left))
        set_class(part, cls)
    return part


def _key_at(self: nn.Module, keys: Any, idx: Any) -> Any:
    """The key of the author's child at a position, for torch to set an item."""
    slots = slots_of(self)
    return [key for key in keys if key not in slots][operator.index(idx)]


def _refuse(self: nn.Module, *args: Any) -> Any:
    raise SEInjectError(
        f"this {type(self).__name__} has {len(slots_of(self))} injected blocks, and to shift its children "
        "would rename them: eject() the model, change it, then inject() it")


MEMBERS = {
    "__iter__": _iter, "__len__": _len, "__getitem__": _getitem, "_get_item_by_idx": _key_at, "__delitem__": _refuse,
    "insert": _refuse}  # fmt: skip


def sequential_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a plain `nn.Sequential`'s class whose positions do not count the blocks."""
    return generated(base, (), {**MEMBERS, "__reduce_ex__": _reduce}, "sequential")


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    return new_of, (base_class(self),), self.__getstate__(), None, None, _set_state


def _set_state(module: nn.Module, state: dict[str, Any]) -> None:
    module.__setstate__(dict(state))
    set_class(module, sequential_class(type(module)))
