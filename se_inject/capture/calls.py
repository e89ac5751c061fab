"""What a recorded run consists of: its calls of modules."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

REST = "**"  # among the keyword arguments of a call in a trace: all of the caller's ``**kwargs``


@dataclasses.dataclass(eq=False)
class Call:
    """One call of a module during the recorded run.

    Attributes:
        path, module: The module, and its dotted name in the model.
        args, kwargs, output: What it was called with, on meta tensors, and what it returned.
        parent, children: The calls around and inside.
        begin, end: Moments of the run: `a.begin < b.begin < a.end` says that call `b` is inside call `a`. A call that raised
            has the end -1.
        changes_list: Whether it changed a list among its arguments.
        operators: How many operators ran inside.
        own_trail: The operators that its own forward ran, and the calls of its children; see `trail`.
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
    own_trail: list[tuple[int, tuple[int, ...], tuple[int, ...]]] = dataclasses.field(default_factory=list)
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


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One recorded run of a model.

    Attributes:
        root: The call of the model itself.
        input_size: (C, H, W) of the images.
        macs: Multiply-adds for one image.
        error: What the model raised, where the run did not come to its end. Calls without an end were running then.
        where: The path of the module that raised it; empty for the model itself.
    """

    root: Call
    input_size: tuple[int, ...]
    macs: int
    error: Exception | None = None
    where: str | None = None

    @property
    def ended(self) -> str | None:
        """Where and why the run ended before its end; None where it did not."""
        if self.error is None:
            return None
        cause = self.error.__cause__
        why = re.split(r"\.\s|\n", str(cause).strip())[0].rstrip(".")
        return f"the run without values ended in {self.where or 'the model itself'} ({type(cause).__name__}: {why})"
