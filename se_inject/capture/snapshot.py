"""A model on the meta device for a while, and afterwards the very objects that it had before."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import itertools
import operator
import random
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ..undo import entered, surgery_lock, undone
from .author_code import functions_of, is_authors, is_of_library, names_in
from .containers import LARGE, PLAIN_CLASSES, contents, differs, put_all_back

_AT_CALL = ("_forward_hooks", "_forward_pre_hooks")
_AT_BACKWARD = ("_backward_hooks", "_backward_pre_hooks")
HOOKS = (*_AT_CALL, *_AT_BACKWARD)
_HOOK_FLAGS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
ORIGINAL = "_se_original"  # of a twin on the meta device: the small tensor that it stands for
_CACHED = type(functools.lru_cache(is_of_library))  # the class of functions that keep what they return
_CALLED = (types.FunctionType, types.MethodType, types.BuiltinMethodType, functools.partial)
_OF_TORCH = frozenset(vars(nn.Module()))


@contextlib.contextmanager
def kept_globals(classes: Iterable[Any]) -> Iterator[Callable[[], bool]]:
    """Afterwards the global containers that the forwards of these classes name have the items that they had before.

    Inside, the function that it yields tells whether one of them has changed.
    """
    asked = [_globals_of(cls) for cls in classes if not cls.__module__.startswith("torch.")]
    names = {(id(namespace), name): namespace for found, _ in asked for namespace, name in found}
    bound = [(namespace, name, namespace[name]) for (_, name), namespace in names.items() if name in namespace]
    kept = contents([*(value for _, _, value in bound), *(default for _, defaults in asked for default in defaults)])

    def put_back() -> None:
        for namespace, name, value in bound:
            namespace[name] = value
        put_all_back(kept)

    with undone(put_back):
        yield lambda: any(namespace.get(name) is not value for namespace, name, value in bound) or any(
            differs(holder, items) for holder, items in kept)


@functools.lru_cache(maxsize=1024)
def _globals_of(cls: Any) -> tuple[list[tuple[dict[str, Any], str]], list[Any]]:
    """The names of globals in a class's forward and in what that calls, with their namespaces; and the default values there."""
    functions = functions_of(cls)
    found = {
        (id(f.__globals__), name): (f.__globals__, name) for f in functions for name in names_in(f) if name in f.__globals__}
    return list(found.values()), [
        value for f in functions for value in (*(f.__defaults__ or ()), *(f.__kwdefaults__ or {}).values())]


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks of its calls or of their backward."""
    return any(module.__dict__.get(kind) for kind in HOOKS)


def is_small(t: torch.Tensor) -> bool:
    """Whether a tensor is one whose values a forward may read, such as sizes and strides."""
    return t.numel() <= 4096


class Caches:
    """Puts back what the author's code keeps of tensors that it makes on the meta device, which would be of no use later.

    Where such a tensor is made, `note` looks at the functions that are running inside the function of the code `until`: at what
    they name of their Python module and of the class of their module, and whether `functools.lru_cache` keeps what they return.
    """

    def __init__(self, until: types.CodeType) -> None:
        self._until = until
        self._seen: dict[int, types.CodeType] = {}
        self._kept: list[tuple[Any, Any]] = []
        self._functions: list[Any] = []

    def note(self) -> None:
        frame: types.FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code is not self._until:
            code, namespace = frame.f_code, frame.f_globals
            if id(code) not in self._seen:
                self._seen[id(code)] = code
                if is_authors(namespace.get("__name__")):
                    self._look(code, namespace, frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None)
            frame = frame.f_back

    def _look(self, code: types.CodeType, namespace: dict[str, Any], module: Any) -> None:
        classes = type(module).__mro__ if isinstance(module, nn.Module) else ()
        holders = [namespace, *(vars(cls) for cls in classes if is_authors(cls.__module__))]
        self._kept += contents([holder[name] for holder in holders for name in code.co_names if name in holder])
        for holder in holders:
            cached = holder.get(code.co_name)
            if isinstance(cached, _CACHED) and getattr(inspect.unwrap(cached), "__code__", None) is code:
                self._functions.append(cached)

    def put_back(self) -> None:
        put_all_back(self._kept)
        for cached in self._functions:
            cached.cache_clear()


def set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Give a module another class, past an author's own ``__setattr__``, which may refuse or do something else."""
    object.__setattr__(module, "__class__", cls)


@contextlib.contextmanager
def restored(modules: Iterable[nn.Module]) -> Iterator[Callable[[], bool]]:
    """Afterwards each module has the class and the attributes, as objects, that it had before.

    Inside, lists and dicts among the attributes are copies, as a forward may keep a cache there. Containers further inside
    get their items back. Inside, the function that it yields tells whether something has changed.
    """
    saved = [(m, m.__class__, dict(m.__dict__)) for m in modules]
    deeper: list[Any] = []
    for _, _, attributes in saved:
        for key in attributes.keys() - _OF_TORCH:
            value = attributes[key]
            if type(value) not in PLAIN_CLASSES:
                items = value.values() if type(value) is dict else value if type(value) in (list, tuple) else (value,)
                if isinstance(value, _CALLED):
                    items = _held_by(value)
                deeper += items if len(items) <= LARGE else ()
    kept = contents(deeper)

    def put_back() -> None:
        for m, cls, attributes in saved:
            if m.__class__ is not cls:
                set_class(m, cls)
            m.__dict__.clear()
            m.__dict__.update(attributes)
        put_all_back(kept)

    with undone(put_back):
        copies: list[tuple[Any, Any]] = []
        inside: list[tuple[dict[str, Any], list[str], list[Any]]] = []
        for m, _, attributes in saved:
            now = m.__dict__
            for key, value in attributes.items():
                cls: Any = type(value)
                if cls is dict or cls is list:
                    now[key] = value.copy()
                    copies.append((now[key], value))
                elif cls not in PLAIN_CLASSES and _is_consumed(cls):
                    now[key] = value.clone_state() if cls is torch.Generator else copy.copy(value)
                    copies.append((now[key], value))
            inside.append((now, list(now), list(now.values())))
        yield lambda: any(list(now) != keys or not all(map(operator.is_, now.values(), values))
                          for now, keys, values in inside) or any(itertools.starmap(_is_other, copies)) or any(
            differs(holder, items) for holder, items in kept)


@contextlib.contextmanager
def kept_hooks(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Afterwards each module has the hooks that it had before, and the containers that they hold have their items back."""
    dicts = [m.__dict__[key] for m in modules for key in (*HOOKS, *_HOOK_FLAGS)]
    filled = [(d, d.copy()) for d in dicts if d]
    held = contents([value for d, _ in filled for hook in d.values() for value in _held_by(hook)])

    def put_back() -> None:
        for d in filter(None, dicts):
            d.clear()
        for d, hooks in filled:
            d.update(hooks)
        put_all_back(held)

    with undone(put_back):
        yield


def _held_by(hook: Any) -> list[Any]:
    """What a hook, or another function that a module holds, may write into.

    That is the object of its method, the arguments of a partial, what its function closes over.
    """
    if isinstance(hook, functools.partial):
        return [*hook.args, *hook.keywords.values(), *_held_by(hook.func)]
    cells = getattr(getattr(hook, "__func__", hook), "__closure__", None) or ()
    filled = (cell.cell_contents for cell in cells if cell != types.CellType())
    return [getattr(hook, "__self__", hook), *filled]


@contextlib.contextmanager
def all_or_nothing(model: nn.Module, tensors: Iterable[torch.Tensor] = ()) -> Iterator[None]:
    """An error inside, an interrupt too, leaves `model` as it was: classes, attributes, children, hooks of loading, modes.

    So are `requires_grad` and torch's random numbers. Nothing is left to do after the body: a change is there in whole or not
    at all.

    Args:
        model: The model that is changed inside.
        tensors: Parameters whose values change. A copy of them is kept.
    """
    modules = [(m, m.__class__, m.__class__.forward) for m in model.modules()]
    kept: list[tuple[Any, Any]] = [  # what this package changes, and no more, as a model has many modules
        (d, dict(d)) for m, _, _ in modules for d in (m.__dict__, m._modules, m._load_state_dict_pre_hooks)]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    values = [(t, t.detach().clone()) for t in tensors]
    drawn = torch.get_rng_state()
    try:
        yield
    except BaseException:
        for m, cls, _ in modules:
            set_class(m, cls)
        put_all_back(kept)
        for m, cls, forward in modules:
            if cls.forward is not forward:  # a GraphModule's class is its own
                m.recompile()  # type: ignore[operator]
        for p, flag in flags:
            if p.requires_grad != flag:  # a tensor of inference mode refuses to be set
                p.requires_grad_(flag)
        with entered(torch.no_grad()):
            for t, value in values:
                t.copy_(value)
        torch.set_rng_state(drawn)
        raise


@functools.cache
def _is_consumed(cls: Any) -> bool:
    """Whether each use of a value changes the next: an iterator that can be copied, or a random generator."""
    return issubclass(cls, (Iterator, random.Random, torch.Generator)) and not issubclass(cls, types.GeneratorType)


def _is_other(now: Any, value: Any) -> bool:
    """Whether a copy is no longer what it was copied from."""
    if type(value) in (dict, list):
        return bool(now or value) and differs(now, value)
    if isinstance(value, torch.Generator):
        return not torch.equal(now.get_state(), value.get_state())
    return repr(now.__reduce__()) != repr(value.__reduce__())


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, `model` is in eval mode. Afterwards each module's `training` flag is as before."""
    modes = [(m, m.training) for m in model.modules()]

    def put_back() -> None:
        for m, training in modes:
            m.training = training

    with undone(put_back):
        type(model).train(model, False)  # the class's method: that of a frozen base takes note of what it holds
        yield


@contextlib.contextmanager
def on_meta(model: nn.Module) -> Iterator[None]:
    """Inside, `model` is in eval mode, and its tensors are on the meta device. Other threads wait.

    Of its hooks, those are there that its own library has set, as transformers does where a forward reads hidden states.
    Inference mode is off, as its tensors do not count writes. Afterwards the random numbers of Python and numpy go on as
    before.
    """
    with entered(surgery_lock, torch.inference_mode(False)), _on_meta(model):
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
            if is_small(t) and not isinstance(t, nn.Parameter):
                twin.__dict__[ORIGINAL] = t
            twins[id(t)] = nn.Parameter(twin, requires_grad=False) if isinstance(t, nn.Parameter) else twin
        return twins[id(t)]

    python, numpy = random.getstate(), sys.modules.get("numpy.random")
    of_numpy = None if numpy is None else numpy.get_state(legacy=False)

    def put_back() -> None:
        random.setstate(python)
        if numpy is not None:
            numpy.set_state(of_numpy)

    with undone(put_back), restored(modules):
        for m in modules:
            d = m.__dict__
            for key, value in list(d.items()):
                if isinstance(value, torch.Tensor):
                    d[key] = meta(value)
                elif type(value) is list:
                    d[key] = [meta(v) for v in value]
                elif type(value) is dict and value:
                    d[key] = {k: meta(v) for k, v in value.items()}
            for key in ("_parameters", "_buffers"):
                d[key] = {name: meta(t) for name, t in d[key].items()}
            d["_modules"] = dict(d["_modules"])
            own = {number for key in _AT_CALL for number, hook in d[key].items() if is_of_library(hook, type(m))}
            for key in (*_AT_CALL, *_HOOK_FLAGS):  # fresh ones, as a forward may register hooks on its first call
                d[key] = OrderedDict((number, value) for number, value in d[key].items() if number in own)
            for key in _AT_BACKWARD:
                d[key] = OrderedDict()
            d["training"] = False
        yield
