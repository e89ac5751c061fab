"""Places and sites as data: what `placement` and `sites` find, and the rewriting reads."""

from __future__ import annotations

import dataclasses

from torch import fx

from ..dataflow.module_graph import ModuleGraph
from ..site import Site
from .patterns import Candidate
from .slots import Slot


@dataclasses.dataclass(eq=False)
class Place:
    """Where a block goes.

    Attributes:
        unit: The unit that the place belongs to.
        view, node: The forward, and the value in it that the block gates.
        users: The nodes that get the gated value; None is all.
        fill: The slot that the block fills.
        inner: Whether layers of the unit follow the block.
        depthwise: Whether the block comes right behind a depthwise convolution.
        reason: Why there can be no block.
    """

    unit: Candidate
    view: ModuleGraph
    node: fx.Node
    users: list[fx.Node] | None = None
    fill: Slot | None = None
    inner: bool = False
    depthwise: bool = False
    reason: str | None = None


@dataclasses.dataclass(eq=False)
class PlacedSite:
    """A site and its place in the traced forward, for the rewriting."""

    site: Site
    place: Place
    gain: float

    @property
    def view(self) -> ModuleGraph:
        return self.place.view
