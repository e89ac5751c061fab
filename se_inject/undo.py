"""Undone at any rate: an interrupt (KeyboardInterrupt, MemoryError) may come at any line, on the way out of a `with` too.

Python does not call ``__exit__`` where an interrupt comes between the last line of a body and the exit. But it then frees
the generator behind a `contextlib.contextmanager`, which runs the generator's handlers. So whatever must be undone is
undone by a generator, through `undone` or `entered`, and twice where an interrupt stops the first time.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import_lock = threading.RLock()  # for imports on first use: a child process could not import a half imported module
surgery_lock = threading.RLock()  # all threads share `nn.Module`, which is patched, and models, whose tensors are swapped
if hasattr(os, "register_at_fork"):  # a fork waits for what another thread does with a lock, the later of the two first
    for _lock in (import_lock, surgery_lock):
        os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


@contextlib.contextmanager
def undone(undo: Callable[[], object]) -> Iterator[None]:
    """Afterwards `undo` has run. It must be such that a second call changes nothing, or completes the first."""
    try:
        try:
            yield
        finally:
            undo()
    except BaseException:
        undo()
        raise


@contextlib.contextmanager
def entered(*managers: AbstractContextManager[Any]) -> Iterator[None]:
    """Inside, locks and modes are entered, in this order. Use it for those that are no generators."""
    stack = contextlib.ExitStack()
    with undone(stack.close):
        for manager in managers:
            stack.enter_context(manager)
        yield
