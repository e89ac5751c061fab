"""TODO"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import fx

from ..dataflow.module_graph import ModuleGraph
from ..dataflow.ops import shape
from .merged_layers import Affine


@dataclasses.dataclass(eq=False)
class Source:
    """A tensor whose mean tells that of a block's input: a value in a forward, its channel axis, and the maps between,
    the last first."""

    view: ModuleGraph
    node: fx.Node
    axis: int
    steps: tuple[Callable[[], Affine], ...] = ()

    @property
    def channels(self) -> int:
        return shape(self.node)[self.axis]

    @property
    def elements(self) -> int:
        """Elements to read for one image."""
        sizes = shape(self.node)
        count = 1
        for n in sizes[1:]:
            count *= n
        return count
