"""Run a model once without computing, and keep every module call with its arguments and results.

A graph of the whole model loses the modules, and modules are rewritten. So the model is run once, eagerly, on meta
tensors. The recorded calls give the shapes for the traces of single modules, and prove that a trace takes the path that
the model takes.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ..errors import TraceError
from ..undo import entered, surgery_lock, undone
from .calls import Call, Run
from .containers import leaves, tensors_in
from .example import Example
from .meta_ops import MetaOps, storage
from .snapshot import Caches, kept_globals, kept_hooks, restored
from .trail import Step, alike, called, is_trusted, numbered, returned


def _as_given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments as they are now: a list among them may grow during the call."""
    if not kwargs and all(isinstance(a, torch.Tensor) for a in args):
        return args, kwargs
    given: tuple[tuple[Any, ...], dict[str, Any]] = tree_map(_same, (args, kwargs))
    return given


def _same(value: Any) -> Any:
    return value


def run(model: nn.Module, example: Example, ops: MetaOps) -> None:
    """Run `model` once, without computing. Use it inside `on_meta`.

    Raises:
        TraceError: The model's own forward raised on this input.
    """
    seed, state = torch.initial_seed(), torch.get_rng_state()
    ops.making = (caches := Caches(run.__code__)).note

    def unseed() -> None:
        if torch.initial_seed() != seed:  # the model has seeded; draws alone take nothing on the meta device
            torch.set_rng_state(state)

    try:
        modules = list(model.modules())
        with (undone(unseed), restored(modules), kept_hooks(modules), kept_globals({type(m) for m in modules}),
              undone(caches.put_back), entered(torch.no_grad(), ops)):
            example.run(model)
    except MemoryError:
        raise
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} failed on {example}: {type(error).__name__}: {error}. If the model needs another size, "
            "pass input_size=(C, H, W); for inputs of another kind, pass example_inputs=: a tensor, a tuple of arguments, or a "
            "dict of keyword arguments."
        ) from error


def record(model: nn.Module, example: Example, ops: MetaOps) -> Run:
    """Run `model` once and keep its calls, up to where its forward raised, if it did. Use it inside `on_meta`.

    Raises:
        TraceError: The model raised before it called a forward.
    """
    example = example.marked()
    paths = {m: name for name, m in model.named_modules()}
    stack: list[Call] = []
    root: list[Call] = []
    count = 0
    where: str | None = None
    written: list[int] = []
    own: list[tuple[list[torch.UntypedStorage], list[Step]]] = []
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
        ops.detailed = not is_trusted(module)
        written.append(len(ops.written))

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        nonlocal count, taken
        call = stack.pop()
        call.output, call.end = output, count
        call.operators += len(ops.trail)
        since = ops.written[written.pop():]
        if since:
            given = set(map(storage, tensors_in((args, kwargs))))
            call.writes = frozenset(s._cdata for s in since) & given
        take_own()
        if call.passes and getattr(module, "inplace", False) is True:  # dropout, which writes in train mode
            ops.written.append(args[0].untyped_storage())
            taken = len(ops.written), taken[1]
            call.writes = frozenset({storage(args[0])})
        writes, trail = own.pop()
        ops.detailed = not stack or not is_trusted(stack[-1].module)
        call.own_writes, call.own_trail = tuple(writes), [*trail, returned(leaves((output,), {}))]
        if own:
            own[-1][1].append(called(leaves(call.args, call.kwargs), leaves((output,), {})))
        call.changes_list = call.args is not args and not alike((args, kwargs), (call.args, call.kwargs))
        count += 1

    def fail(module: nn.Module) -> None:
        """Leave a call that raised: it has no end. The forward around it may go on."""
        nonlocal where
        if where is None:
            where = paths[module]
        stack.pop()
        written.pop()
        take_own()
        own.pop()
        ops.detailed = not stack or not is_trusted(stack[-1].module)

    numbered(example.tensors)
    error: TraceError | None = None
    with entered(surgery_lock):
        original, thread = nn.Module.__call__, threading.get_ident()

        @functools.wraps(original)
        def recorded(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread or module not in paths:
                return original(module, *args, **kwargs)
            enter(module, args, kwargs)
            try:
                output = original(module, *args, **kwargs)
            except BaseException:
                fail(module)
                raise
            leave(module, args, kwargs, output)
            return output

        with undone(lambda: setattr(nn.Module, "__call__", original)):
            nn.Module.__call__ = recorded  # type: ignore[method-assign]
            try:
                run(model, example, ops)
            except TraceError as raised:
                error = raised
    if error is not None and not root:  # before its first call
        raise error
    return Run(root[0], example.size, ops.macs // example.batch, error, where if error is not None else None)
