"""The units of a model: of the candidates of all owners the outermost; an author's slot goes first."""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from ..capture.calls import Call
from ..capture.forward import is_plain_sequential
from ..config import SEConfig
from ..dataflow.module_graph import ModuleGraph, TracedModel
from .attention import Gates
from .patterns import Candidate, candidates, chain_end, is_inside, plain_convs
from .slots import Slot, empty_slot, gate_slot, kind_of

LONG_SKIP = "a skip around a stage of residual units"


def find_units(traces: TracedModel, gates: Gates, config: SEConfig) -> tuple[list[Candidate], dict[nn.Module, Slot]]:
    """The units of a recorded model, and the slots that are their places, by owner.

    Candidates that are no place for a block come with their reason.
    """
    views = [view for view in map(traces.view, list(traces.calls)) if view is not None]
    found = {view.module: candidates(view) for view in views}
    linear = [c for group in found.values() for c in group if c.reason is not None]
    rooms, slots = _rooms(traces, views, gates, _Holders(linear), config)
    chosen: list[Candidate] = []
    for view in views:
        own = [c for c in found[view.module] if c.reason is None]
        slot = slots.get(view.module)
        chosen += own if slot is None else [_at_slot(slot, view, own)]
    types = {type(c.view.module) for c in chosen if c.kind == "residual"}
    owners = {c.view.module for c in chosen}
    begins = sorted(c.view.call.begin for c in chosen if c.kind == "residual")
    for view in views:
        if view.module not in owners:
            c = _without_shortcut(view, rooms.get(view.module), type(view.module) in types, begins, config)
            chosen += [] if c is None else [c]
    for c in chosen:
        if c.kind == "conv" and type(c.view.module) in types:
            c.kind = "inverted_residual"  # the same block, where stride or width left it without a shortcut
    if not chosen:
        chosen = [c for view in views if not _is_in_untraced(view.call, traces) for c in plain_convs(view)]
    return _outermost(chosen, slots, linear), slots


def _is_in_untraced(call: Call, traces: TracedModel) -> bool:
    """Whether a call is inside a forward, other than the model's, that could not be traced: an unknown unit."""
    return any(c.module in traces.failures for c in _outside(call))


def find_untraced(traces: TracedModel, units: list[Candidate]) -> list[tuple[Call, str]]:
    """The modules on maps whose forward could not be traced, each with the reason, except those around or inside units.

    Of modules inside each other the outermost is listed. A module that returns its map among other things is listed only
    where there is nothing else to say of the model.
    """
    holders = _Holders(units)
    around: set[int] = set()
    for c in units:
        at: Call | None = c.view.call
        while at is not None:
            around.add(id(at))
            at = at.parent

    def listed(tensors_alone: bool) -> dict[Call, str]:
        found = {traces.calls[module][0]: why for module, why in traces.failures.items() if traces.has_weights(module)}
        return {
            call: why for call, why in found.items()
            if (isinstance(call.output, torch.Tensor) or not tensors_alone) and map_of(call) is not None
            and id(call) not in around and not any(True for _ in holders.around(call))}

    found = listed(True) or ({} if units else listed(False))
    return [(call, why) for call, why in found.items() if not any(c in found for c in _outside(call))]


def map_of(call: Call) -> torch.Tensor | None:
    """The first map, or sequence of tokens, in the output of a call."""
    return next((t for t in tree_leaves(call.output) if isinstance(t, torch.Tensor) and t.dim() >= 3), None)


def _outside(call: Call) -> Iterator[Call]:
    """The calls around a call, the model's own left out."""
    at = call.parent
    while at is not None and at.parent is not None:
        yield at
        at = at.parent


def _rooms(
    traces: TracedModel, views: list[ModuleGraph], gates: Gates, linear: _Holders, config: SEConfig
) -> tuple[dict[nn.Module, Slot], dict[nn.Module, Slot]]:
    """The slots of all owners, empty or filled, and among them those that take a block.

    Where a class fills a slot in one owner and leaves it empty in another, both slots count. A slot in a linear branch
    does not: the author's code may fuse the branch into one convolution, and the block would be lost.
    """
    empty = {}
    for view in views:
        slot = empty_slot(traces, view)
        if slot is not None and not any(True for _ in linear.around(view.call)):
            empty[view.module] = slot
    filled = {view.module: slot for view in views if (slot := gate_slot(view, gates.pure)) is not None}
    slots: dict[nn.Module, Slot] = {}
    if config.placement == "auto":
        slots.update(empty)
        if config.existing == "skip":
            left = {(type(m), slot.name) for m, slot in empty.items()}
            slots.update({m: slot for m, slot in filled.items() if (type(m), slot.name) in left})
    if config.existing == "replace":
        slots.update(filled)
    return {**empty, **filled}, slots


def _at_slot(slot: Slot, view: ModuleGraph, found: list[Candidate]) -> Candidate:
    """The unit that a slot belongs to, with the slot as its end: a slot goes before other places."""
    own = found if slot.view.forward is view.forward else candidates(slot.view)
    around = [c for c in own if c.branch >> slot.view.index[slot.node] & 1 and c.reason is None]
    if around:
        unit = max(around, key=lambda c: c.kind == "residual")
        return dataclasses.replace(unit, view=slot.view)
    return Candidate(slot.view, kind_of(slot), slot.node, (1 << len(slot.view.nodes)) - 1)


def _without_shortcut(
    view: ModuleGraph, room: Slot | None, of_residual_class: bool, begins: list[int], config: SEConfig
) -> Candidate | None:
    """The whole forward as a unit, where its class has a shortcut in other owners, or a slot for attention."""
    if room is None or of_residual_class:
        return chain_end(view) if of_residual_class else None
    end = chain_end(view, kind_of(room)) if config.placement != "auto" else None
    if end is None and room.view.forward is not view.forward:
        return None
    output = room.node if end is None else end.output
    fork = None if end is None else end.fork
    return Candidate(view, kind_of(room), output, _without(view, output, begins), fork)


def _without(view: ModuleGraph, node: fx.Node, begins: list[int]) -> int:
    """Mask of the nodes before `node` in its forward, without calls inside which one of the calls `begins` is."""
    mask = 0
    for n in view.members(view.ancestors[view.index[node]]):
        span = view.call_of(n) if n.op == "call_module" else None
        if span is None or bisect_left(begins, span.begin) == bisect_left(begins, span.end):
            mask |= 1 << view.index[n]
    return mask


class _Holders:
    """The units around a call, in the forwards that lead to it."""

    def __init__(self, units: Iterable[Candidate]) -> None:
        self._of: dict[int, list[Candidate]] = defaultdict(list)
        for c in units:
            for call in c.view.calls(c.branch):
                self._of[id(call)].append(c)

    def around(self, call: Call) -> Iterator[Candidate]:
        """The units whose branches make `call`, directly or further inside."""
        at: Call | None = call
        while at is not None:
            yield from self._of.get(id(at), ())
            at = at.parent


def _outermost(chosen: list[Candidate], slots: dict[nn.Module, Slot], linear: list[Candidate]) -> list[Candidate]:
    """Drop units inside other units, so that no value is gated twice.

    A unit with a slot further inside is dropped for the slot. An aggregation of modules that are residual units is dropped
    for these: it is a stage of them (CSPNet). So is a skip around a stage of residual units.
    """
    holders = _Holders(chosen)
    gone: set[int] = set()
    for c in chosen:
        if c.view.module in slots:
            gone |= {id(b) for b in holders.around(c.view.call) if b.view.module not in slots}
    for c in chosen:
        if c.kind == "residual" and id(c) not in gone:
            gone |= {id(b) for b in holders.around(c.view.call) if b.kind == "aggregation"}
    kept = [c for c in chosen if id(c) not in gone]
    long = _long_skips(kept)
    kept = [c for c in kept if c not in long]
    out = _not_inside(kept, kept)
    out += [dataclasses.replace(c, reason=LONG_SKIP) for c in _not_inside(long, out)]
    linear_holders = _Holders(linear)
    held = {id(b) for c in out for b in linear_holders.around(c.view.call)}
    return out + [c for c in _not_inside(linear, out) if id(c) not in held]


def _long_skips(chosen: list[Candidate]) -> list[Candidate]:
    """The residuals around two or more residual units that follow each other in one `nn.Sequential`."""
    holders = _Holders(chosen)
    seen: dict[tuple[int, int], Call] = {}
    long: dict[int, Candidate] = {}
    for c in (c for c in chosen if c.kind == "residual"):
        stage = c.view.call.parent
        if stage is not None and is_plain_sequential(stage.module):
            for b in holders.around(c.view.call):
                if b.kind == "residual" and seen.setdefault((id(b), id(stage)), c.view.call) is not c.view.call:
                    long[id(b)] = b
    return list(long.values())


def _not_inside(these: list[Candidate], units: list[Candidate]) -> list[Candidate]:
    holders = _Holders(units)
    in_view: dict[nn.Module, list[Candidate]] = defaultdict(list)
    for c in units:
        in_view[c.view.module].append(c)
    out = []
    for c in these:
        siblings = in_view[c.view.module]
        first = next((b for b in siblings if b.output is c.output and b.view is c.view), c)
        if first is c and not any(True for _ in holders.around(c.view.call)) and not any(
                b is not c and b.output is not c.output and is_inside(c, b) for b in siblings if b.view is c.view):
            out.append(c)
    return out
