"""What the author's code says, read and not run: the functions behind a forward, its hooks, what it asks, and what draws."""

from __future__ import annotations

import dis
import functools
import inspect
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn


def is_ours(frame: types.FrameType) -> bool:
    """Whether code of torch or of this package runs, and not the traced code, to which checkpointing belongs."""
    name = str(frame.f_globals.get("__name__"))
    return name.startswith(("torch.", "se_inject.")) and name != "torch.utils.checkpoint"


@functools.lru_cache(maxsize=4096)
def functions_of(cls: Any) -> tuple[types.FunctionType, ...]:
    """The forward of a class, and the methods and functions of its file that the forward calls, directly or not."""
    found: dict[types.CodeType, types.FunctionType] = {}
    todo: list[Any] = [getattr(cls, "forward", None)]
    while todo:
        value = todo.pop()
        function = inspect.unwrap(getattr(value, "__func__", value))
        if not isinstance(function, types.FunctionType) or function.__code__ in found:
            continue
        found[function.__code__] = function
        for code in codes_of(function):
            for step in dis.get_instructions(code):
                if step.opname == "LOAD_GLOBAL":
                    value = function.__globals__.get(step.argval)
                    if isinstance(value, types.FunctionType) and value.__module__ in (function.__module__, cls.__module__):
                        todo.append(value)
                elif step.opname in _READS_ATTRIBUTE and not hasattr(nn.Module, step.argval):
                    todo.append(getattr(cls, step.argval, None))
    return tuple(found.values())


_READS_ATTRIBUTE = {"LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"}


def codes_of(function: types.FunctionType) -> Iterator[types.CodeType]:
    """The code of a function, and of the functions and comprehensions inside it."""
    todo = [function.__code__]
    while todo:
        yield (code := todo.pop())
        todo += [c for c in code.co_consts if isinstance(c, types.CodeType)]


def names_in(function: types.FunctionType) -> set[str]:
    """The names of globals and attributes in a function."""
    return {name for code in codes_of(function) for name in code.co_names}


def is_of_library(hook: Any, cls: Any) -> bool:
    """Whether a hook is written in the installed library that a module's class is from: it belongs to what the module does.

    Code outside of site-packages is the user's own. torch sets hooks on its modules where a user asks for them, and so does
    this package.
    """
    while isinstance(hook, functools.partial):
        hook = hook.func
    hook = getattr(hook, "__func__", hook)
    function = inspect.unwrap(hook if isinstance(hook, types.FunctionType) else type(hook).__call__)
    if not isinstance(function, types.FunctionType):
        return False
    library, *others = (str(m).partition(".")[0] for m in (function.__module__, *(base.__module__ for base in cls.__mro__)))
    installed = not _INSTALLED.isdisjoint(Path(function.__code__.co_filename).parts)
    return installed and library in others and library not in ("torch", "se_inject")


_INSTALLED = {"site-packages", "dist-packages"}


@functools.lru_cache(maxsize=4096)
def own_call(cls: Any) -> tuple[Any, ...]:
    """The class that gives a module a `__call__` of its own; none where it has that of torch."""
    owner = next(c for c in cls.__mro__ if "__call__" in c.__dict__)
    return () if owner.__module__.startswith("torch.") else (owner,)


@functools.lru_cache(maxsize=4096)
def asks_by_identity(cls: Any) -> str | None:
    """The word by which a forward asks what a proxy answers otherwise than the traced value; None where it does not."""
    for function in functions_of(cls):
        for code in codes_of(function):
            steps = list(dis.get_instructions(code))
            for i, step in enumerate(steps):
                if step.opname == "LOAD_GLOBAL" and step.argval in ("type", "callable"):
                    return str(step.argval)
                if step.opname == "IS_OP" and not _is_harmless(steps[:i]):
                    return "is"
    return None


@functools.lru_cache(maxsize=4096)
def opens_context(cls: Any) -> bool:
    """Whether a forward, or a decorator of it, has a ``with`` statement."""
    functions, wrapper = [*functions_of(cls)], cls.forward
    while hasattr(wrapper, "__wrapped__"):
        functions.append(wrapper)
        wrapper = wrapper.__wrapped__
    return any(
        step.opname == "WITH_EXCEPT_START" for function in functions if isinstance(function, types.FunctionType)
        for code in codes_of(function) for step in dis.get_instructions(code))


# names by which code asks what a module or its children are
_ASKING = {
    "isinstance", "issubclass", "hasattr", "getattr", "vars", "dir", "str", "repr", "id", "super", "children", "named_children",
    "modules", "named_modules", "get_submodule", "_modules", "_get_name", "__class__", "__dict__"}  # fmt: skip


@functools.lru_cache(maxsize=4096)
def may_ask_for_children(cls: Any) -> bool:
    """Whether a forward may ask what its children are: it says so, or calls a function of another file, which may."""
    functions = functions_of(cls)
    for function in functions:
        for name in names_in(function):
            value = function.__globals__.get(name)
            foreign = isinstance(value, types.FunctionType) and inspect.unwrap(value) not in functions and (
                not str(value.__module__).startswith("torch."))
            if name in _ASKING or foreign or isinstance(getattr(cls, name, None), property):
                return True
    return False


def _is_harmless(before: list[dis.Instruction]) -> bool:
    """Whether an `is` compares with None, or the result of a call with a constant, as in ``getattr(m, "flag", 0) is True``."""
    constant = before[-1]
    return constant.opname == "LOAD_CONST" and (constant.argval is None or before[-2].opname.startswith("CALL"))


# functions of torch.nn.functional that are Python and call operators that draw
_DRAW_IN_PYTHON = {"dropout1d", "dropout2d", "dropout3d", "gumbel_softmax"}


@functools.cache
def draws_by_name(name: str) -> bool:
    """Whether a function or a method of torch by this name draws random numbers, in one of its overloads."""
    packet = getattr(torch.ops.aten, name, None) if name.isidentifier() and not name.startswith("__") else None
    overloads: list[str] = getattr(packet, "overloads", list)()
    return name in _DRAW_IN_PYTHON or any(
        torch.Tag.nondeterministic_seeded in getattr(packet, overload).tags for overload in overloads)
