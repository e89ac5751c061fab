"""Run a model once without computing, and keep every module call with its arguments and results.

A whole-model graph loses module boundaries, and those are what gets rewritten. So the model is run
once, eagerly, on meta tensors; the recorded calls give the shapes of what is traced later, module by
module, and prove that the trace took the path that the model takes.
"""

from __future__ import annotations

import contextlib
import dataclasses
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
from torch.utils._pytree import tree_leaves, tree_map

from .errors import TraceError
from .meta import MetaOps, storage

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOK_FLAGS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")


@dataclasses.dataclass(eq=False)
class Call:
    """One call of a module during the recorded run.

    `begin` and `end` number the calls in order, so that `a.begin < b.begin < a.end` says that call
    `b` happened inside call `a`. `changes_list` says that a list among the arguments was changed, `operators`
    how many operators ran inside, `writes` into which of its arguments' storages they wrote, and `own_writes` into
    which storages its own forward did.
    """

    path: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    parent: Call | None
    begin: int
    end: int = -1
    output: Any = None
    changes_list: bool = False
    operators: int = 0
    writes: frozenset[int] = frozenset()
    own_writes: tuple[torch.UntypedStorage, ...] = ()
    children: list[Call] = dataclasses.field(default_factory=list)

    def walk(self) -> Iterator[Call]:
        """This call and all calls inside it, in the order of their beginning."""
        yield self
        for child in self.children:
            yield from child.walk()

    @property
    def passes(self) -> bool:
        """Whether the call returned the very tensor that it was given: identity, dropout and drop path in eval mode."""
        return self.operators == 0 and isinstance(self.output, torch.Tensor) and bool(self.args) and (
            self.output is self.args[0])


alone = threading.RLock()  # all threads share `nn.Module`, which is patched, and models, whose tensors are swapped

if hasattr(os, "register_at_fork"):  # a thread that held it is not there any more
    os.register_at_fork(after_in_child=alone._at_fork_reinit)  # type: ignore[attr-defined]

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
def untouched(modules: Iterable[nn.Module]) -> Iterator[None]:
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
def abstract(model: nn.Module) -> Iterator[None]:
    """Inside, `model` is in eval mode, without hooks, and its tensors are on the meta device.

    One thread at a time: another waits. Inference mode is off, as its tensors do not say whether they were written into.
    """
    with alone, torch.inference_mode(False), _abstract(model):
        yield


@contextlib.contextmanager
def _abstract(model: nn.Module) -> Iterator[None]:
    modules = list(model.modules())
    twins: dict[int, torch.Tensor] = {}

    def meta(t: Any) -> Any:
        if not isinstance(t, torch.Tensor) or t.is_meta:
            return t
        if id(t) not in twins:
            twin = torch.empty_like(t, device="meta")
            twins[id(t)] = nn.Parameter(twin, requires_grad=False) if isinstance(t, nn.Parameter) else twin
        return twins[id(t)]

    with untouched(modules):
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


def _as_given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments as they are now: a list among them may grow during the call."""
    if not kwargs and all(isinstance(a, torch.Tensor) for a in args):
        return args, kwargs
    given: tuple[tuple[Any, ...], dict[str, Any]] = tree_map(_same, (args, kwargs))
    return given


def _same(value: Any) -> Any:
    return value


def run(model: nn.Module, inputs: torch.Tensor, ops: MetaOps | None = None) -> int:
    """Run `model` once, without computing, and return its multiply-adds. Use it inside `abstract`.

    Raises:
        TraceError: The model's own forward raised on this input.
    """
    ops = ops or MetaOps(factories=True)
    try:
        with untouched(list(model.modules())), torch.no_grad(), ops:
            model(inputs)
            return ops.macs
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} failed on an input of shape {tuple(inputs.shape)}: "
            f"{type(error).__name__}: {error}. If the model needs another size, pass input_size=(C, H, W)."
        ) from error


def record(model: nn.Module, inputs: torch.Tensor) -> tuple[Call, int]:
    """Run `model` once and return the call of its root, and its multiply-adds. Use it inside `abstract`.

    Raises:
        TraceError: The model's own forward raised on this input.
    """
    paths = {m: name for name, m in model.named_modules()}
    stack: list[Call] = []
    root: list[Call] = []
    count = 0
    ops = MetaOps(factories=True)
    written: list[int] = []
    own: list[list[torch.UntypedStorage]] = []
    taken = 0

    def take_writes() -> None:
        nonlocal taken
        if own:
            own[-1] += ops.written[taken:]
        taken = len(ops.written)

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal count
        parent = stack[-1] if stack else None
        args, kwargs = _as_given(args, kwargs)
        call = Call(paths[module], module, args, kwargs, parent, count, operators=-ops.operators)
        count += 1
        (parent.children if parent else root).append(call)
        take_writes()
        stack.append(call)
        own.append([])
        written.append(len(ops.written))

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        nonlocal count
        call = stack.pop()
        call.output, call.end = output, count
        call.operators += ops.operators
        since = ops.written[written.pop():]
        if since:
            given = {storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
            call.writes = frozenset(s._cdata for s in since) & given
        take_writes()
        call.own_writes = tuple(own.pop())
        call.changes_list = call.args is not args and not alike((args, kwargs), (call.args, call.kwargs))
        count += 1

    with alone:
        original, thread = nn.Module.__call__, threading.get_ident()

        @functools.wraps(original)
        def recorded(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread or module not in paths:
                return original(module, *args, **kwargs)
            enter(module, args, kwargs)
            output = original(module, *args, **kwargs)
            leave(module, args, kwargs, output)
            return output

        try:
            nn.Module.__call__ = recorded  # type: ignore[method-assign]
            macs = run(model, inputs, ops)
        finally:
            nn.Module.__call__ = original  # type: ignore[method-assign]
    return root[0], macs


def alike(a: Any, b: Any) -> bool:
    """Whether two arguments have the same structure and shapes."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.shape == b.shape
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(alike(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(alike, a, b))
    return True
