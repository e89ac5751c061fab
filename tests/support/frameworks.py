"""The table of frameworks: its columns, and how a cell of it is found.

A check is called with an injected model and, where that fails, with its base: a framework that fails on
the base does so for a reason of the base's own.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from typing import Any

import torch
from torch import nn

from se_inject import block_paths

from .families import Family, plain, trained

Check = Callable[[nn.Module, Family], None]


@dataclasses.dataclass(frozen=True)
class Column:
    """A framework: its check, the model that this is given, and the families that are asked (empty: all)."""

    function: Check
    make: Callable[[Family], nn.Module]
    only: tuple[str, ...] = ()

    def asks(self, family: Family) -> bool:
        return not self.only or family.name in self.only

    def outcome(self, family: Family) -> str:
        """A cell of the table: "yes", or why the base fails in the same manner; else the injected model's error is raised."""
        try:
            self.function(copy.deepcopy(self.make(family)), family)
        except BrokenExecutor:
            raise
        except Exception as mine:
            try:
                self.function(plain(family), family)
            except type(mine) as own:
                return f"base: {_words(own)}"
            raise
        return "yes"


def _words(error: Exception) -> str:
    """The first clause of an error, without what is another on each run."""
    text = re.split(r"\s\(|\.\s|\n", re.sub(r"\x1b\[\d*m", "", str(error)).strip())[0].rstrip(".").replace("|", "/")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


COLUMNS: dict[str, Column] = {}
FEW = ("resnet18", "convnext_atto", "vit_tiny_patch16_224")


def check(
    column: str, make: Callable[[Family], nn.Module] = trained, only: tuple[str, ...] = ()
) -> Callable[[Check], Check]:
    def register(function: Check) -> Check:
        COLUMNS[column] = Column(function, make, only)
        return function
    return register


def gradients(model: nn.Module, run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a weighed sum of the outputs; the model's gradients are None afterwards."""
    torch.manual_seed(2)
    y = run(x)
    (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    found = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    for path in block_paths(model):
        assert any(v.abs().sum() > 0 for k, v in found.items() if k.startswith(f"{path}.")), f"{path} learns nothing"
    model.zero_grad()
    return found


def assert_equal(mine: Any, theirs: Any) -> None:
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
