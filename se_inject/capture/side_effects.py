"""What a forward may do beside its outputs, measured around a trace, so that it is refused and not lost."""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from ..undo import entered, undone


def modes() -> tuple[object, ...]:
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *(
        (torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")))


@contextlib.contextmanager
def other_modes() -> Iterator[None]:
    """Inside, grad is on, and autocast to a dtype that no forward asks for: a forward that sets a mode is then seen."""
    was = {d: (torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")}

    def put_back() -> None:
        for d, (enabled, dtype) in was.items():
            torch.set_autocast_enabled(d, enabled)
            torch.set_autocast_dtype(d, dtype)

    with entered(torch.enable_grad()), undone(put_back):
        for d in was:
            torch.set_autocast_enabled(d, True)
            torch.set_autocast_dtype(d, torch.float64)
        yield


def state_of(module: nn.Module) -> tuple[object, ...]:
    """What a traced forward may not change, beside attributes: buffers, the modes of modules, and hooks."""
    versions = tuple(
        t._version for d in (module._parameters, module._buffers) for t in d.values()
        if t is not None and not t.is_inference())
    return versions, tuple(m.training for m in module.modules()), RemovableHandle.next_id


def random_state() -> tuple[object, ...]:
    """The state of Python's and numpy's random numbers. Another thread may draw some, too."""
    numpy = sys.modules.get("numpy")
    return random.getstate()[1], None if numpy is None else numpy.random.get_state()[1].tobytes()


@functools.lru_cache(maxsize=1024)
def may_draw(cls: Any) -> bool:
    """Whether the file of a forward imports random numbers of Python or numpy; others show in the numbers of the trail."""
    namespace = getattr(inspect.unwrap(cls.forward), "__globals__", {})
    return any(
        v is random or getattr(v, "__name__", "") == "numpy" or getattr(v, "__module__", "") in ("random", "numpy.random")
        for v in list(namespace.values()))


@functools.lru_cache(maxsize=4096)
def asks_by_identity(cls: Any) -> str | None:
    """What a forward, or a method that it calls, asks of its values that a proxy answers otherwise; None where it does not."""
    todo, seen = ["forward"], {"forward"}
    while todo:
        function = inspect.unwrap(getattr(cls, todo.pop(), None) or (lambda: None))
        code = getattr(function, "__code__", None)
        call, before = None, None
        for step in dis.get_instructions(code) if code is not None else ():
            if step.opname == "LOAD_GLOBAL" and step.argval in ("type", "callable"):
                return str(step.argval)
            if step.opname == "IS_OP" and not (before is not None and before.opname == "LOAD_CONST" and (
                    before.argval is None or (call is not None and call.opname.startswith("CALL")))):  # getattr(...) is True
                return "is"
            call, before = before, step
        new = {n for n in code.co_names if n not in seen and not hasattr(nn.Module, n)} if code is not None else set()
        seen |= new
        todo += [n for n in new if callable(getattr(cls, n, None))]
    return None


class Draws(TorchDispatchMode):
    """Inside, notices whether this thread draws random numbers by torch."""

    drawn = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.drawn = self.drawn or torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))
