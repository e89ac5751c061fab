"""What the author's code says, read and not run: the functions behind a forward, its hooks, what it asks, and what draws."""

from __future__ import annotations

import dis
import functools
import inspect
import sys
import types
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn


def is_ours(frame: types.FrameType) -> bool:
    """Whether code of torch or of this package runs, and not the traced code, to which checkpointing belongs."""
    name = str(frame.f_globals.get("__name__"))
    return name.partition(".")[0] in ("torch", "se_inject") and name != "torch.utils.checkpoint"


@functools.lru_cache(maxsize=4096)
def functions_of(cls: Any, elsewhere: bool = False) -> tuple[types.FunctionType, ...]:
    """The forward of a class, and the methods and functions of its file that the forward calls, directly or not.

    With `elsewhere`, also the functions of other files of its library, or of the user's own code.
    """
    found: dict[types.CodeType, types.FunctionType] = {}
    todo: list[Any] = [getattr(cls, "forward", None)]
    while todo:
        value = todo.pop()
        function = inspect.unwrap(getattr(value, "__func__", value))
        if not isinstance(function, types.FunctionType) or function.__code__ in found:
            continue
        found[function.__code__] = function
        for code in codes_of(function):
            holder: Any = None
            for step in dis.get_instructions(code):
                if step.opname == "LOAD_GLOBAL":
                    value = holder = function.__globals__.get(step.argval)
                    if isinstance(value, types.FunctionType) and (
                            value.__module__ in (function.__module__, cls.__module__) or (elsewhere and _is_near(value, cls))):
                        todo.append(value)
                elif step.opname in _READS_ATTRIBUTE:
                    value = vars(holder).get(step.argval) if isinstance(holder, types.ModuleType) else None
                    if elsewhere and isinstance(value, types.FunctionType) and _is_near(value, cls):
                        todo.append(value)
                    elif not hasattr(nn.Module, step.argval):
                        todo.append(getattr(cls, step.argval, None))
                    holder = None
    return tuple(found.values())


def _is_near(function: types.FunctionType, cls: Any) -> bool:
    """Whether a function is of the library of a class, or both are of code that is not installed."""
    if not is_authors(function.__module__):
        return False
    forward = inspect.unwrap(cls.forward)
    files = [getattr(getattr(f, "__code__", None), "co_filename", "") for f in (function, forward)]
    return function.__module__.partition(".")[0] == cls.__module__.partition(".")[0] or all(
        _INSTALLED.isdisjoint(Path(file).parts) for file in files)


def is_authors(module: object) -> bool:
    """Whether a Python module of this name is of an author of models: none of torch, Python or this package."""
    library = str(module).partition(".")[0]
    return library not in ("torch", "se_inject") and library not in sys.stdlib_module_names


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
def compared_with_none(cls: Any) -> frozenset[str]:
    """The variables of a forward that it compares with None."""
    function = inspect.unwrap(cls.forward)
    steps = list(dis.get_instructions(function)) if isinstance(function, types.FunctionType) else []
    found = set()
    for variable, step, after in zip(steps, steps[1:], steps[2:]):
        jumps = "JUMP" in step.opname and step.opname.endswith("NONE")
        compares = step.opname == "LOAD_CONST" and step.argval is None and after.opname == "IS_OP"
        if "LOAD_FAST" in variable.opname and (jumps or compares):
            found.add(variable.argval[-1] if isinstance(variable.argval, tuple) else variable.argval)
    return frozenset(found)


@functools.lru_cache(maxsize=4096)
def own_call(cls: Any) -> tuple[Any, ...]:
    """The class that gives a module a `__call__` of its own; none where it has that of torch."""
    owner = next(c for c in cls.__mro__ if "__call__" in c.__dict__)
    return () if owner.__module__.startswith("torch.") else (owner,)


def why_not_held(cls: Any, ran: Iterable[tuple[types.CodeType, frozenset[str]]]) -> str | None:
    """Why a trace of a class's forward cannot hold what it does; None where it can. `ran` is what `note_code` found."""
    return _asked_by(cls) or next((why for code, plain in ran if (why := _not_held(code, plain)) is not None), None)


@functools.lru_cache(maxsize=4096)
def _asked_by(cls: Any) -> str | None:
    """The question that a forward, or a function that it calls, may ask of a proxy, in words."""
    asked = (_asked(code, _functions_around(f)) for f in functions_of(cls, elsewhere=True) for code in codes_of(f))
    return next(filter(None, asked), None)


def _functions_around(function: types.FunctionType) -> frozenset[str]:
    """The names from around a function that are functions, as in a decorator."""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or ()))
    return _functions_among({name: cell.cell_contents for name, cell in cells.items() if cell != types.CellType()})


def _functions_among(values: Mapping[str, Any]) -> frozenset[str]:
    return frozenset(name for name, value in values.items() if isinstance(value, types.FunctionType))


_answers: dict[tuple[int, frozenset[str]], tuple[types.CodeType, str | None]] = {}  # two pieces of code are compared slowly


def _not_held(code: types.CodeType, plain: frozenset[str]) -> str | None:
    key = id(code), plain
    if key not in _answers:
        steps = [step.opname for step in dis.get_instructions(code)]
        why = _asked(code, plain)
        if why is None and "PUSH_EXC_INFO" in steps:
            why = f"it has a `{'with' if 'WITH_EXCEPT_START' in steps else 'try'}` statement, which a trace does not hold"
        _answers[key] = code, why
    return _answers[key][1]


def _asked(code: types.CodeType, plain: Collection[str]) -> str | None:
    steps = [step for step in dis.get_instructions(code) if step.opname != "CACHE"]
    for i, step in enumerate(steps):
        asked = None
        if step.opname == "LOAD_GLOBAL" and step.argval in ("type", "callable", "id"):
            after = next((s.argval for s in steps[i + 1:] if s.opname != "PUSH_NULL"), None)
            asked = None if after == "self" else str(step.argval)
        elif step.opname == "IS_OP" and not _is_harmless(steps[:i], {"self", *plain}):
            asked = "is"
        elif step.opname.startswith("MATCH_"):
            asked = "match"
        elif step.argval in ("ExitStack", "enter_context"):
            return "it enters contexts, which a trace does not hold"
        if asked is not None:
            return f"it asks with `{asked}`, which a trace answers otherwise"
    return None


_known: dict[int, tuple[types.CodeType, bool]] = {}  # by identity: whether it is an author's


def note_code(
    frame: types.FrameType | None, until: types.CodeType, found: dict[int, tuple[types.CodeType, frozenset[str]]]
) -> None:  # fmt: skip
    """Add the author's code that is running to `found`, by identity: from a frame outwards, up to that of `until`.

    With each code goes which of its names from around it are functions. Python's and torch's own functions are left out, but
    for the contexts of `contextlib` that the author's code has entered as decorators.
    """
    inner: types.FrameType | None = None
    while frame is not None and (code := frame.f_code) is not until:
        if id(code) not in _known:
            _known[id(code)] = code, is_authors(frame.f_globals.get("__name__"))
        if inner is not None and inner.f_globals.get("__name__") == "contextlib" and _known[id(code)][1]:
            found.setdefault(id(inner.f_code), (inner.f_code, frozenset()))
        if _known[id(code)][1] and id(code) not in found:
            inside = frame.f_locals if code.co_freevars else {}
            found[id(code)] = code, _functions_among({name: inside[name] for name in code.co_freevars if name in inside})
        inner, frame = frame, frame.f_back


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


def _is_harmless(before: list[dis.Instruction], plain: Collection[str]) -> bool:
    """Whether an `is` compares with None, the result of a call with a constant, as in ``getattr(m, "flag", 0) is True``, or
    what plain names give, as in ``type(self).forward is wrapper``."""
    constant = before[-1]
    if constant.opname == "LOAD_CONST" and (constant.argval is None or before[-2].opname.startswith("CALL")):
        return True
    missing = 2  # the operands, whose instructions end here
    for step in reversed(before):
        if "FAST" in step.opname or "DEREF" in step.opname:
            names = step.argval if isinstance(step.argval, tuple) else (step.argval,)
            if any(name not in plain for name in names):
                return False
        missing -= dis.stack_effect(step.opcode, step.arg, jump=False)
        if missing <= 0:
            return True
    return False


# functions of torch.nn.functional that are Python and call operators that draw
_DRAW_IN_PYTHON = {"dropout1d", "dropout2d", "dropout3d", "gumbel_softmax"}


@functools.cache
def draws_by_name(name: str) -> bool:
    """Whether a function or a method of torch by this name draws random numbers, in one of its overloads."""
    packet = getattr(torch.ops.aten, name, None) if name.isidentifier() and not name.startswith("__") else None
    overloads: list[str] = getattr(packet, "overloads", list)()
    return name in _DRAW_IN_PYTHON or any(
        torch.Tag.nondeterministic_seeded in getattr(packet, overload).tags for overload in overloads)
