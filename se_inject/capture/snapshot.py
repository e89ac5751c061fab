"""TODO"""

from __future__ import annotations

import contextlib
import functools
import operator
import os
import sys
import threading
import types
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOK_FLAGS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
surgery_lock = threading.RLock()  # all threads share `nn.Module`, which is patched, and models, whose tensors are swapped
if hasattr(os, "register_at_fork"):  # a thread that held it is not there any more
    os.register_at_fork(after_in_child=surgery_lock._at_fork_reinit)  # type: ignore[attr-defined]
_DEPTH = 5  # how far objects inside objects are followed from a module's attributes
_LARGE = 1000  # a container with more items holds data, and its items are not followed
_PLAIN = frozenset({type(None), bool, int, float, str})
_OF_TORCH = frozenset(vars(nn.Module()))


@functools.lru_cache(maxsize=4096)
def _kind(cls: Any) -> Any:
    """What values of a class are for `untouched`: a container, a tuple, an object with attributes, or nothing."""
    if issubclass(cls, (nn.Module, torch.Tensor, type)):
        return None
    for kind in (dict, list, set, deque, tuple):
        if issubclass(cls, kind):
            return kind
    library = str(cls.__module__).partition(".")[0]
    own = library != "torch" and library not in sys.stdlib_module_names
    return object if cls is types.SimpleNamespace or (own and getattr(cls, "__dictoffset__", None)) else None


def _kept(values: list[Any]) -> list[tuple[Any, Any]]:
    """The containers among values, and among what they and plain objects hold, each with a copy of what is in it."""
    kept: dict[int, tuple[Any, Any]] = {}
    for _ in range(_DEPTH):
        inner: list[Any] = []
        for holder in values:
            cls: Any = type(holder)
            kind = None if cls in _PLAIN else _kind(cls)
            if kind is object:
                holder, kind = holder.__dict__, dict
            if kind is None or id(holder) in kept:
                continue
            items = holder if kind is tuple else dict(_dict_of(holder).items(holder)) if kind is dict else kind.copy(holder)
            kept[id(holder)] = holder, items
            if len(items) <= _LARGE:
                inner += items.values() if kind is dict else items
        values = inner
    return list(kept.values())


def _dict_of(holder: dict[Any, Any]) -> type[dict[Any, Any]]:
    """The class whose methods see what a dict holds, whatever a subclass gives out."""
    return OrderedDict if isinstance(holder, OrderedDict) else dict


def _put_back(holder: Any, items: Any) -> None:
    """Let a container hold what it held; compared by identity: what a trace left there cannot be asked whether it is equal."""
    if isinstance(holder, dict):
        base = _dict_of(holder)
        now = dict(base.items(holder))
        if len(now) != len(items) or not all(map(operator.is_, now, items)) or not all(
                map(operator.is_, now.values(), items.values())):
            base.clear(holder)
            for key, value in items.items():
                base.__setitem__(holder, key, value)
    elif holder is not items and (len(holder) != len(items) or not all(map(operator.is_, holder, items))):
        holder.clear()
        holder.update(items) if isinstance(holder, set) else holder.extend(items)


@contextlib.contextmanager
def restored(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Whatever happens inside, each module's class and attributes are afterwards the very objects they were.

    Lists and dicts among them are copies inside: a forward may keep a cache there. What is deeper, in containers and
    plain objects, is put back.
    """
    saved = [(m, m.__class__, dict(m.__dict__)) for m in modules]
    deeper: list[Any] = []
    for _, _, attributes in saved:
        for key, value in attributes.items():
            if type(value) not in _PLAIN and key not in _OF_TORCH:
                items = value.values() if type(value) is dict else value if type(value) in (list, tuple) else (value,)
                deeper += items if len(items) <= _LARGE else ()
    kept = _kept(deeper)
    try:
        for m, _, attributes in saved:
            for key, value in attributes.items():
                if type(value) in (dict, list):
                    m.__dict__[key] = value.copy()
        yield
    finally:
        for m, cls, attributes in saved:
            m.__class__ = cls
            m.__dict__.clear()
            m.__dict__.update(attributes)
        for holder, items in kept:
            _put_back(holder, items)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, `model` is in eval mode. Afterwards each module's `training` flag is as before."""
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for m, training in modes:
            m.training = training


@contextlib.contextmanager
def on_meta(model: nn.Module) -> Iterator[None]:
    """Inside, `model` is in eval mode, without hooks, and its tensors are on the meta device.

    One thread at a time: another waits. Inference mode is off, as its tensors do not say whether they were written into.
    """
    with surgery_lock, torch.inference_mode(False), _on_meta(model):
        yield


@contextlib.contextmanager
def _on_meta(model: nn.Module) -> Iterator[None]:
    modules = list(model.modules())
    twins: dict[int, torch.Tensor] = {}

    def meta(t: Any) -> Any:
        if not isinstance(t, torch.Tensor) or t.is_meta:
            return t
        if id(t) not in twins:
            twin = torch.empty_like(t, device="meta")
            twins[id(t)] = nn.Parameter(twin, requires_grad=False) if isinstance(t, nn.Parameter) else twin
        return twins[id(t)]

    with restored(modules):
        for m in modules:
            d = m.__dict__
            for key, value in list(d.items()):
                if isinstance(value, torch.Tensor):
                    d[key] = meta(value)
                elif type(value) is list:
                    d[key] = [meta(v) for v in value]
                elif type(value) is dict:
                    d[key] = {k: meta(v) for k, v in value.items()}
            for key in ("_parameters", "_buffers"):
                d[key] = {name: meta(t) for name, t in d[key].items()}
            d["_modules"] = dict(d["_modules"])
            for key in (*HOOKS, *_HOOK_FLAGS):
                if d[key]:
                    d[key] = OrderedDict()
            d["training"] = False
        yield
