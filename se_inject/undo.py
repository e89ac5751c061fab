"""Undone at any rate: an interrupt (KeyboardInterrupt, MemoryError) may come at any line, on the way out of a `with` too.

Python does not call ``__exit__`` where an interrupt comes between the last line of a body and the exit. But it then frees
the generator behind a `contextlib.contextmanager`, which runs the generator's handlers. So whatever must be undone is
undone by a generator, through `undone` or `entered`, and twice where an interrupt stops the first time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any


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
