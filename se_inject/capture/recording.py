"""Run a model once without computing, and keep every module call with its arguments and results.

A graph of the whole model loses the modules, and modules are rewritten. So the model is run once, eagerly, on meta
tensors. The recorded calls give the shapes for the traces of single modules, and prove that a trace takes the path that
the model takes.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import TraceError
from ..undo import entered, surgery_lock, undone
from .meta_ops import MetaOps, storage
from .snapshot import kept_globals, restored


@dataclasses.dataclass(eq=False)
class Call:
    """One call of a module during the recorded run.

    Attributes:
        path, module: The module, and its dotted name in the model.
        args, kwargs, output: What it was called with, on meta tensors, and what it returned.
        parent, children: The calls around and inside.
        begin, end: Moments of the run: `a.begin < b.begin < a.end` says that call `b` is inside call `a`.
        changes_list: Whether it changed a list among its arguments.
        operators: How many operators ran inside.
        own_trail: The operators that its own forward, and not a child's, ran.
        writes: The storages of its arguments that were written into.
        own_writes: The storages that its own forward, and not a child's, wrote into.
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
    own_trail: tuple[int, ...] = ()
    children: list[Call] = dataclasses.field(default_factory=list)

    def walk(self) -> Iterator[Call]:
        """This call and all calls inside it, in the order of their beginning."""
        yield self
        for child in self.children:
            yield from child.walk()

    @property
    def passes(self) -> bool:
        """Whether the call returned its input itself, as an identity does, and dropout and drop path in eval mode."""
        return self.operators == 0 and isinstance(self.output, torch.Tensor) and bool(self.args) and (
            self.output is self.args[0])


def _as_given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments as they are now: a list among them may grow during the call."""
    if not kwargs and all(isinstance(a, torch.Tensor) for a in args):
        return args, kwargs
    given: tuple[tuple[Any, ...], dict[str, Any]] = tree_map(_same, (args, kwargs))
    return given


def _same(value: Any) -> Any:
    return value


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One recorded run of a model: the call of the model itself, the (C, H, W) of its images, and multiply-adds for one."""

    root: Call
    input_size: tuple[int, ...]
    macs: int


def run(model: nn.Module, inputs: torch.Tensor, ops: MetaOps | None = None) -> int:
    """Run `model` once, without computing, and return its multiply-adds. Use it inside `on_meta`.

    Raises:
        TraceError: The model's own forward raised on this input.
    """
    ops = ops or MetaOps(factories=True)
    try:
        modules = list(model.modules())
        with restored(modules), kept_globals({type(m) for m in modules}), entered(torch.no_grad(), ops):
            model(inputs)
            return ops.macs
    except MemoryError:
        raise
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} failed on an input of shape {tuple(inputs.shape)}: "
            f"{type(error).__name__}: {error}. If the model needs another size, pass input_size=(C, H, W)."
        ) from error


def record(model: nn.Module, inputs: torch.Tensor) -> tuple[Call, int]:
    """Run `model` once and return the call of the model itself, and its multiply-adds. Use it inside `on_meta`.

    Raises:
        TraceError: The model's own forward raised on this input.
    """
    paths = {m: name for name, m in model.named_modules()}
    stack: list[Call] = []
    root: list[Call] = []
    count = 0
    ops = MetaOps(factories=True)
    written: list[int] = []
    own: list[tuple[list[torch.UntypedStorage], list[int]]] = []
    taken = (0, 0)

    def take_own() -> None:
        """Give what ran since the last call to the forward that ran it."""
        nonlocal taken
        if own:
            own[-1][0].extend(ops.written[taken[0]:])
            own[-1][1].extend(ops.trail[taken[1]:])
        taken = len(ops.written), len(ops.trail)

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal count
        parent = stack[-1] if stack else None
        args, kwargs = _as_given(args, kwargs)
        call = Call(paths[module], module, args, kwargs, parent, count, operators=-len(ops.trail))
        count += 1
        (parent.children if parent else root).append(call)
        take_own()
        stack.append(call)
        own.append(([], []))
        written.append(len(ops.written))

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        nonlocal count
        call = stack.pop()
        call.output, call.end = output, count
        call.operators += len(ops.trail)
        since = ops.written[written.pop():]
        if since:
            given = {storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
            call.writes = frozenset(s._cdata for s in since) & given
        take_own()
        writes, trail = own.pop()
        call.own_writes, call.own_trail = tuple(writes), tuple(trail)
        call.changes_list = call.args is not args and not alike((args, kwargs), (call.args, call.kwargs))
        count += 1

    with entered(surgery_lock):
        original, thread = nn.Module.__call__, threading.get_ident()

        @functools.wraps(original)
        def recorded(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread or module not in paths:
                return original(module, *args, **kwargs)
            enter(module, args, kwargs)
            output = original(module, *args, **kwargs)
            leave(module, args, kwargs, output)
            return output

        with undone(lambda: setattr(nn.Module, "__call__", original)):
            nn.Module.__call__ = recorded  # type: ignore[method-assign]
            macs = run(model, inputs, ops)
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
