"""Stage numbers as timm's ``out_indices``."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..capture.calls import Call
from ..dataflow.module_graph import TracedModel
from ..dataflow.ops import shape
from .places import Place


class Stages:
    """The stage of a place.

    The model's feature info names the last module of each stage. Where those names are not the model's, its reductions
    count; where a model has no feature info, the halvings of the image. The stem is 0.
    """

    def __init__(self, model: nn.Module, traces: TracedModel) -> None:
        info = getattr(model, "feature_info", None)
        info = getattr(info, "info", info)
        entries = [e for e in info if isinstance(e, dict)] if isinstance(info, (list, tuple)) else []
        size = traces.run.input_size
        self._positions, self._axes = math.prod(size[1:]), max(len(size) - 1, 1)
        self._reductions: list[float] = [e["reduction"] for e in entries if isinstance(e.get("reduction"), (int, float))]
        if len(self._reductions) != len(entries):
            self._reductions = []
        self._ends = _ends(model, traces, [str(e.get("module", "")) for e in entries])

    def position(self, place: Place) -> int:
        """The moment of the run at which the gated value was made, for sorting."""
        call = self._maker(place)
        return place.view.call.begin if call is None else call.begin

    @staticmethod
    def _maker(place: Place) -> Call | None:
        calls = (place.view.call_of(n) for n in place.view.calls_before(place.node))
        return next((c for c in calls if c.path), None)  # a marker's call has no path

    def of(self, place: Place) -> int:
        dims, dim = shape(place.node), place.view.channel_dim(place.node)
        call = self._maker(place)
        return self.at(
            place.view.call.begin if call is None else call.end, [d for i, d in enumerate(dims) if i not in (0, dim)])

    def at(self, moment: int, size: Sequence[int]) -> int:
        """The stage of a map of this `size` that was made at `moment` of the run."""
        reduction = max(self._positions / max(math.prod(size), 1), 1) ** (1 / self._axes)
        if self._ends:
            first = next((end for end in self._ends if moment <= end), None)
            if first is None:
                return len(self._ends)
            there = [i for i, end in enumerate(self._ends) if end == first]
            if len(there) == 1 or not self._reductions:
                return there[0]
            return min(there, key=lambda i: abs(math.log(self._reductions[i] / reduction)))
        if self._reductions:  # a class token or a padded window is no stage of its own
            return next((i for i, r in enumerate(self._reductions) if r * 1.2 >= reduction), len(self._reductions) - 1)
        return max(round(math.log2(reduction)) - 1, 0)


def _ends(model: nn.Module, traces: TracedModel, names: list[str]) -> list[int]:
    """The moment at which each named module ended, -1 for one without a call; empty where the names are not the model's."""
    calls: list[Call] = [c for group in traces.calls.values() for c in group]
    by_end: dict[str, int] = defaultdict(int)
    for c in calls:
        by_end[c.path] = max(by_end[c.path], c.end)
    ends: list[int] = []
    for name in names:
        path = _resolve(model, by_end, name)
        if path is None:
            return []
        ends.append(max((end for p, end in by_end.items() if p == path or p.startswith(path + ".")), default=-1))
    called = [end for end in ends if end >= 0]
    return ends if called and called == sorted(called) else []


def _resolve(model: nn.Module, paths: Any, name: str) -> str | None:
    """The path that a name means: the name itself, or the only path that ends with it."""
    try:
        model.get_submodule(name)
    except AttributeError:
        inside = [p for p in paths if p.endswith("." + name)]
        return inside[0] if len(inside) == 1 else None
    return name or None
