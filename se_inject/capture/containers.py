"""The containers among values, and in plain objects: their items, how these are put back, and the tensors among them."""

from __future__ import annotations

import functools
import operator
import sys
import types
from collections import OrderedDict, deque
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

_DEPTH = 5  # how far objects inside objects are followed from a module's attributes
LARGE = 1000  # a container with more items holds data, and its items are not followed
PLAIN_CLASSES = frozenset({type(None), bool, int, float, str})


@functools.lru_cache(maxsize=4096)
def _kind(cls: Any) -> Any:
    """What values of a class are: a container, a tuple, an object with attributes, or None."""
    if issubclass(cls, (nn.Module, torch.Tensor, type)):
        return None
    for kind in (dict, list, set, deque, tuple):
        if issubclass(cls, kind):
            return kind
    library = str(cls.__module__).partition(".")[0]
    own = library != "torch" and library not in sys.stdlib_module_names
    return object if cls is types.SimpleNamespace or (own and getattr(cls, "__dictoffset__", None)) else None


def contents(values: list[Any]) -> list[tuple[Any, Any]]:
    """The containers among values, and among the items of these and of plain objects, each with a copy of its items."""
    kept: dict[int, tuple[Any, Any]] = {}
    for _ in range(_DEPTH):
        inner: list[Any] = []
        for holder in values:
            cls: Any = type(holder)
            kind = None if cls in PLAIN_CLASSES else _kind(cls)
            if kind is object:
                holder, kind = holder.__dict__, dict
            if kind is None or id(holder) in kept:
                continue
            items = holder if kind is tuple else dict(_dict_of(holder).items(holder)) if kind is dict else kind.copy(holder)
            kept[id(holder)] = holder, items
            if len(items) <= LARGE:
                inner += items.values() if kind is dict else items
        values = inner
    return list(kept.values())


def _dict_of(holder: dict[Any, Any]) -> type[dict[Any, Any]]:
    """The class whose methods see the items of a dict, past those of a subclass."""
    return OrderedDict if isinstance(holder, OrderedDict) else dict


def _put_back(holder: Any, items: Any) -> None:
    """Give a container its items back."""
    if not differs(holder, items):
        return
    if isinstance(holder, dict):
        base = _dict_of(holder)
        base.clear(holder)
        for key, value in items.items():
            base.__setitem__(holder, key, value)
    else:
        holder.clear()
        holder.update(items) if isinstance(holder, set) else holder.extend(items)


def put_all_back(kept: list[tuple[Any, Any]]) -> None:
    for holder, items in kept:
        _put_back(holder, items)


def differs(holder: Any, items: Any) -> bool:
    """Whether a container has other items. They are compared by identity, as a proxy that a trace left has no equality."""
    if isinstance(holder, dict):
        now = dict(_dict_of(holder).items(holder))
        return len(now) != len(items) or not all(map(operator.is_, now, items)) or not all(
            map(operator.is_, now.values(), items.values()))
    return holder is not items and (len(holder) != len(items) or not all(map(operator.is_, holder, items)))


def leaves(args: Any, kwargs: Any) -> list[Any]:
    """The values in the arguments of a call, tensors and others, and the tensors that objects among them hold."""
    if len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor):  # as most calls have; the walk is slow
        return [args[0]]
    found: list[Any] = tree_leaves((args, kwargs))
    return [*found, *_held(found)]


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors in a value, and those that objects in it hold."""
    found = tree_leaves(value)
    return [t for t in (*found, *_held(found)) if isinstance(t, torch.Tensor)]


def _held(values: list[Any]) -> list[torch.Tensor]:
    """The tensors that dataclasses and other objects among values hold, which torch's trees take for leaves."""
    items = [item for _, items in contents(values) for item in (items.values() if isinstance(items, dict) else items)]
    return [t for t in items if isinstance(t, torch.Tensor)]
