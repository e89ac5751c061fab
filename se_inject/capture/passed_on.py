"""A forward's ``**kwargs`` that it only passes on to its children: a trace can leave their content open.

    def forward(self, x, **kwargs):
        return x + self.attention(x, **kwargs)
"""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx

from ..undo import undone
from .author_code import is_ours
from .calls import REST


class PassedOn:
    """Stands among the constants for ``**kwargs`` of any content."""

    def of(self, proxy: Any) -> Any:
        return {REST: proxy}


@contextlib.contextmanager
def watched(cls: Any, constants: dict[str, Any]) -> Iterator[Callable[[], bool]]:
    """Inside, a forward is traced; the callable that you get says whether it has read its ``**kwargs``.

    Calls with ``**kwargs`` do not read them: calls of modules, and of functions that do not read them either, as decorators
    call a forward. Every other instruction on them does. Without a `PassedOn` among the constants, nothing is watched.
    """
    if not any(isinstance(value, PassedOn) for value in constants.values()):
        yield lambda: False
        return
    watch = _Watch(inspect.unwrap(cls.forward).__code__)
    was = sys.gettrace()

    def put_back() -> None:
        watch.has_read |= sys.gettrace() != watch.enter  # a trace function that raises, or the author's code, takes it off
        sys.settrace(was)

    with undone(put_back):
        sys.settrace(watch.enter)
        yield lambda: watch.has_read


class _Watch:
    """Follows ``**kwargs`` from function to function, by the events of `sys.settrace`."""

    def __init__(self, forward: types.CodeType) -> None:
        self.has_read = False
        self._names = {*_named(forward), "self"}
        self._passes: types.FrameType | None = None  # the frame that is calling something with ``**kwargs``

    def enter(self, frame: types.FrameType, event: str, arg: Any) -> Any:
        by, self._passes = self._passes, None
        if by is not None and frame.f_back is not by:
            self.has_read = True
        if is_ours(frame):
            return None
        name = _variadic(frame.f_code)
        if name is None or REST not in frame.f_locals.get(name, ()):
            return None
        if not self._names >= _named(frame.f_code):  # one of which may be among the keyword arguments
            self.has_read = True
        frame.f_trace_opcodes = True
        return self._step

    def _step(self, frame: types.FrameType, event: str, arg: Any) -> Any:
        if event == "opcode":
            name = _variadic(frame.f_code)
            assert name is not None
            reading, passing = _instructions(frame.f_code, name)
            if self._passes is frame or frame.f_lasti in reading:  # what was called is no function of Python, or ...
                self.has_read = True
            self._passes = frame if frame.f_lasti in passing else None
        return self._step


def _named(code: types.CodeType) -> set[str]:
    """The parameters of a function that have names of their own."""
    return set(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])


def _variadic(code: types.CodeType) -> str | None:
    """The parameter ``**kwargs`` of a function."""
    if not code.co_flags & inspect.CO_VARKEYWORDS:
        return None
    return code.co_varnames[code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS)]


@functools.lru_cache(maxsize=4096)
def _instructions(code: types.CodeType, name: str) -> tuple[frozenset[int], frozenset[int]]:
    """The offsets of the instructions that read a variable, and of the calls that get all of it as keyword arguments."""
    reading, passing = set[int](), set[int]()
    steps = [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]
    for i, step in enumerate(steps):
        names = step.argval if isinstance(step.argval, tuple) else (step.argval,)
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") and step.argval in ("locals", "vars", "eval", "exec"):
            reading.add(step.offset)
        if name not in names or not any(kind in step.opname for kind in ("FAST", "DEREF", "CLOSURE")):
            continue
        passed = [s.opname for s in steps[i + 1 : i + 3]] == ["DICT_MERGE", "CALL_FUNCTION_EX"]
        if passed and step.opname.startswith(("LOAD_FAST", "LOAD_DEREF")) and names.index(name) == len(names) - 1:
            passing.add(steps[i + 2].offset)
        else:
            reading.add(step.offset)
    return frozenset(reading), frozenset(passing)


def passing(graph: fx.Graph) -> list[fx.Node]:
    """The calls in a trace to which the forward passes its ``**kwargs`` on."""
    return [node for node in graph.nodes if REST in node.kwargs]
