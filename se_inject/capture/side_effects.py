"""What a forward may do beside its outputs, measured around a trace, so that it is refused and not lost."""

from __future__ import annotations

import contextlib
import functools
import inspect
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
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


def state_of(tensors: list[torch.Tensor]) -> tuple[object, ...]:
    """What a traced forward may not change, beside attributes: the values of tensors, whether they are trained, and hooks."""
    return (*[None if t.is_inference() else t._version for t in tensors], *[t.requires_grad for t in tensors],
            RemovableHandle.next_id)


def random_state() -> tuple[object, ...]:
    """The state of Python's and numpy's random numbers. Another thread may draw some, too."""
    numpy = sys.modules.get("numpy")
    return random.getstate()[1], None if numpy is None else numpy.random.get_state()[1].tobytes()


@functools.lru_cache(maxsize=1024)
def may_draw(cls: Any) -> bool:
    """Whether the file of a forward imports random numbers of Python or numpy; others show in the numbers of the trail."""
    namespace = getattr(inspect.unwrap(cls.forward), "__globals__", {})
    return any(
        v is random or _said(v, "__name__") == "numpy" or _said(v, "__module__") in ("random", "numpy.random")
        for v in list(namespace.values()))


def _said(value: Any, name: str) -> Any:
    """An attribute of any object; None where it is a stand-in for a missing library, which raises when it is asked."""
    try:
        return getattr(value, name, None)
    except MemoryError:
        raise
    except Exception:
        return None


class Effects(TorchDispatchMode):
    """Inside, notices whether this thread draws random numbers by torch, or writes into a tensor."""

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen = self.seen or torch.Tag.nondeterministic_seeded in func.tags or func._schema.is_mutable
        return func(*args, **(kwargs or {}))
