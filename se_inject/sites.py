"""From the candidates of all owners to the sites of a model, and the exact place of each."""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_left
from collections import defaultdict
from typing import Any

import torch
from torch import fx, nn

from .attention import Gates
from .blocks import block_spec, cost, get_block, problem
from .config import SEConfig
from .graph import _SLICES, Traces, View, is_tensor, shape
from .patterns import Candidate, aggregations, chain_end, last_spatial_conv, plain_convs, residuals
from .planning import Site
from .slots import Slot, empty_slot, gate_slot
from .trace import Call


@dataclasses.dataclass(eq=False)
class Place:
    """Where in an owner's forward a block goes: it gates `node`, for `users` or (None) for all."""

    candidate: Candidate
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
    def view(self) -> View:
        return self.place.candidate.view


def find_sites(model: nn.Module, traces: Traces, config: SEConfig, input_size: tuple[int, ...]) -> list[PlacedSite]:
    """All sites of a recorded model, in the order of execution, the skipped ones with their reason."""
    gates = Gates(traces)
    candidates, slots = _collect(traces, gates, config)
    chosen = _outermost(candidates, slots)
    places = [_place(c, slots.get(c.view.module), config.placement) for c in chosen]
    by_owner: dict[nn.Module, list[Place]] = defaultdict(list)
    for place in places:
        by_owner[place.candidate.view.module].append(place)
    stages = _Stages(model, traces, input_size)
    out: list[PlacedSite] = []
    for module, group in by_owner.items():
        group.sort(key=lambda p: p.candidate.view.index[p.node])
        for place, name in zip(group, _slot_names(module, group)):
            out.append(_site(place, name, traces, gates, stages, config))
    out.sort(key=lambda s: stages.position(s.place))
    return _distinct(out)


def _distinct(found: list[PlacedSite]) -> list[PlacedSite]:
    """One site for each gated tensor: two slices of one tensor (DPN) lead to the same place."""
    seen: set[tuple[int, fx.Node]] = set()
    return [s for s in found if not ((key := (id(s.view), s.place.node)) in seen or seen.add(key))]  # type: ignore[func-returns-value]


def _collect(traces: Traces, gates: Gates, config: SEConfig) -> tuple[list[Candidate], dict[nn.Module, Slot]]:
    candidates: list[Candidate] = []
    slots: dict[nn.Module, Slot] = {}
    views = [view for view in map(traces.view, list(traces.calls)) if view is not None]
    for view in views:
        slot = gate_slot(view, gates) if config.existing == "replace" else None
        if slot is None and config.placement == "auto":
            slot = empty_slot(traces, view)
        if slot is not None:
            slots[view.module] = slot
            view = slot.view
        found = _found_in(view)
        if slot is not None:
            # the author's room wins over the other places of the same forward
            bit = view.index[slot.node]
            around = sorted((c for c in found if c.branch >> bit & 1), key=lambda c: c.kind == "residual")
            if around:
                kind, branch = around[-1].kind, around[-1].branch
            else:
                kind, branch = "inverted_residual" if _is_inner(slot) else "conv", (1 << len(view.nodes)) - 1
            found = [Candidate(view, kind, slot.node, branch)]
        candidates += found
    residual_types = {type(c.view.module) for c in candidates if c.kind == "residual"}
    owners = {c.view.module for c in candidates}
    residual_calls = sorted(c.view.call.begin for c in candidates if c.kind == "residual")
    for view in views:  # where an author put attention is a place, whatever the block is
        slot = gate_slot(view, gates)
        if slot is not None and view.module not in owners:
            kind = "inverted_residual" if _is_inner(slot) else "conv"
            candidates.append(Candidate(view, kind, slot.node, _without(view, slot.node, residual_calls)))
    for view in views:  # the same block, where stride or width left it without a shortcut
        if type(view.module) in residual_types and view.module not in owners:
            end = chain_end(view)
            if end is not None:
                candidates.append(end)
    if not candidates:
        candidates = [c for view in views for c in plain_convs(view)]
    return candidates, slots


def _without(view: View, node: fx.Node, begins: list[int]) -> int:
    """Mask of what comes before `node` in its forward, but for calls in which one of the calls `begins` is."""
    mask = 0
    for n in view.members(view.ancestors[view.index[node]]):
        span = view.call_of(n) if n.op == "call_module" else None
        if span is None or bisect_left(begins, span.begin) == bisect_left(begins, span.end):
            mask |= 1 << view.index[n]
    return mask


def _found_in(view: View) -> list[Candidate]:
    """The candidates of a view; looked for once for all modules that share its forward."""
    found = view.shared("candidates", lambda: [*residuals(view), *aggregations(view)])
    return [dataclasses.replace(c, view=view) for c in found]


def _is_inner(slot: Slot) -> bool:
    """Whether a learned layer of the same forward follows the slot, as in an inverted residual."""
    bit = 1 << slot.view.index[slot.node]
    return any(
        slot.view.is_learned(n) and slot.view.ancestors[slot.view.index[n]] & bit for n in slot.view.nodes)


def _outermost(candidates: list[Candidate], slots: dict[nn.Module, Slot]) -> list[Candidate]:
    """Drop what lies inside another unit, so that nothing is gated twice on one way.

    A unit that holds an empty slot further inside gives way to it.
    """
    def inside(a: Candidate, b: Candidate) -> bool:
        if a is b:
            return False
        if a.view is b.view:
            if a.merge is b.merge is not None:  # several branches of one sum or concat
                return False
            if a.output is b.output:
                return order[id(a)] > order[id(b)]
            return bool(b.branch >> a.view.index[a.output] & 1) and not a.branch >> b.view.index[b.output] & 1
        begin = a.view.call.begin
        return any(c.begin <= begin < c.end for c in spans[id(b)])

    order = {id(c): i for i, c in enumerate(candidates)}
    spans = {id(c): list(c.view.calls(c.branch)) for c in candidates}
    filled = [c for c in candidates if c.view.module in slots]
    kept = [c for c in candidates if c in filled or not any(inside(s, c) for s in filled)]
    return [c for c in kept if not any(inside(c, other) for other in kept)]


def _walk_back(view: View, node: fx.Node, branch: int) -> tuple[fx.Node, fx.Node | None, bool]:
    """From a branch's end to before its drop path, layer scale, gain and channel slice.

    Returns the node, the node behind it on the way, and whether a slice was passed.
    """
    behind, sliced = None, False
    while True:
        source: Any = None
        cut = False
        if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
            source = node.args[0] if view.passes_scaled(view.call_of(node).module) else None
        elif node.target is torch.nn.functional.dropout:
            source = node.args[0]
        elif node.target in _SLICES and is_tensor(node.args[0]):
            source, cut = node.args[0], True
            a, b, dim = shape(source), shape(node), view.channel_dim(source)
            if len(a) != len(b) or any(a[d] != b[d] for d in range(len(a)) if d != dim):
                source = None
        else:
            source = view.is_constant_factor(node)
        if not is_tensor(source) or not branch >> view.index[source] & 1 or len(shape(source)) != len(shape(node)):
            return node, behind, sliced
        behind, node, sliced = node, source, sliced or cut


def _place(c: Candidate, slot: Slot | None, placement: str) -> Place:
    view = c.view
    if slot is not None:
        conv = last_spatial_conv(view, view.ancestors[view.index[slot.node]])
        inner = slot.name == "se" and _is_inner(slot)
        return Place(c, slot.node, fill=slot, inner=inner, depthwise=inner and conv is not None and conv[1])
    merges = [u for u in c.output.users if c.merge is not None and view.ancestors[view.index[c.merge]]
              >> view.index[u] & 1]
    if placement == "inner":
        found = last_spatial_conv(view, c.branch) if c.kind != "conv" else None
        if found is None:
            return Place(c, c.output, reason="placement='inner' needs a convolution over space in the branch")
        return Place(c, found[0], inner=found[1], depthwise=found[1])
    if placement == "pre":
        if c.fork is None:
            return Place(c, c.output, reason="placement='pre' needs a branch that starts in this forward")
        return Place(c, c.fork, [u for u in c.fork.users if c.branch >> view.index[u] & 1])
    if placement in ("post", "identity") and (c.kind != "residual" or c.merge is None):
        if placement == "identity":
            return Place(c, c.output, reason="placement='identity' needs a shortcut")
        return Place(c, c.output)
    if placement == "post":
        assert c.merge is not None
        end = c.merge
        users = list(end.users)
        if len(users) == 1 and view.is_nonlinear(users[0]) and not view.is_learned(users[0]) and \
                is_tensor(users[0]) and shape(users[0]) == shape(end):
            end = users[0]
        return Place(c, end)
    if placement == "identity":
        shortcut = c.shortcuts[0]
        return Place(c, shortcut, [u for u in shortcut.users if not c.branch >> view.index[u] & 1
                                   and c.merge is not None
                                   and view.ancestors[view.index[c.merge]] >> view.index[u] & 1])
    node, behind, sliced = _walk_back(view, c.output, c.branch)
    if sliced or c.kind != "residual" or any(_in_place(u) for u in node.users):
        return Place(c, node)
    return Place(c, node, [behind] if behind is not None else merges or None)


def _in_place(node: fx.Node) -> bool:
    """Whether a node writes into its first argument, so that later readers see the new value."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op == "call_method" and name.endswith("_") and not name.endswith("__")


def _slot_names(module: nn.Module, places: list[Place]) -> list[str]:
    """``se``, or ``se1``, ``se2``, ... for several in one owner; names that are taken are passed over."""
    if places[0].fill is not None:
        return [places[0].fill.name]
    if len(places) == 1 and not hasattr(module, "se"):
        return ["se"]
    names: list[str] = []
    i = 0
    while len(names) < len(places):
        i += 1
        if not hasattr(module, f"se{i}"):
            names.append(f"se{i}")
    return names


def _site(place: Place, slot: str, traces: Traces, gates: Gates, stages: _Stages, config: SEConfig) -> PlacedSite:
    c, view = place.candidate, place.candidate.view
    dims = shape(place.node)
    dim = view.channel_dim(place.node)
    channels = dims[dim]
    layout = "NLC" if len(dims) == 3 and dim == 2 else "NCHW" if dim == 1 else "NHWC"
    size = tuple(d for i, d in enumerate(dims) if i not in (0, dim))
    base = channels
    if place.inner:
        base = _input_channels(view) or channels
    style = "efficientnet" if place.inner and layout == "NCHW" and (
        place.depthwise or channels > _output_channels(view, channels)) else "se"
    spec = block_spec(config, channels, base, layout, style, from_input=place.inner)
    owner = view.path
    reason = place.reason
    if reason is None and "_se_edits" in view.module.__dict__:
        reason = f"already has channel attention at {_own_block(view)}"
    if reason is None:
        taken = gates.in_region(view, c.branch) or _gated_behind(view, place.node, gates)
        if taken is not None and config.existing == "skip":
            reason = f"already has channel attention at {taken}"
        elif taken is not None and config.existing == "replace" and not (place.fill and place.fill.replaces):
            reason = f"its channel attention is no module that could be swapped at {taken}"
        elif place.fill is None and any(c.changes_list for c in traces.calls[view.module]):
            reason = f"{type(view.module).__name__}.forward changes a list that it is given"
        elif layout == "NLC" and size == (1,):
            reason = "only one position: nothing to squeeze"
        elif layout == "NLC" and get_block(config.block).positions:
            reason = f"block={config.block!r} needs a map with height and width, and this is a sequence of tokens"
        elif place.fill is not None and place.fill.gain != 1.0 and problem(config, place.fill.gain):
            reason = problem(config, place.fill.gain)
        elif dim not in (1, len(dims) - 1) or len(dims) > 4:
            reason = f"layout of shape {dims} is not known"
    calls = len(traces.calls[view.module])
    params, macs = cost(spec, config, size) if reason is None else (0, 0)
    site = Site(
        path=f"{owner}.{slot}" if owner else slot, owner=owner, slot=slot, kind=c.kind, channels=channels,
        layout=layout, size=size, stage=stages.of(place), style=style, rd_channels=spec.rd_channels,
        params=params, macs=calls * macs, reason=reason)
    if site.reason is None:
        site = dataclasses.replace(site, reason=config.rejects(site))
    return PlacedSite(site, place, 1.0 if place.fill is None else place.fill.gain)


def _own_block(view: View) -> str:
    slot = view.module.__dict__["_se_edits"].edits[0].slot
    return f"{view.path}.{slot}" if view.path else str(slot)


def _gated_behind(view: View, node: fx.Node, gates: Gates) -> str | None:
    for user in node.users:
        if user.op == "call_module" and view.call_of(user).module in gates.nodes:
            return str(view.call_of(user).path)
    return None


def _input_channels(view: View) -> int | None:
    for node in view.nodes:
        if node.op == "placeholder" and is_tensor(node) and len(shape(node)) >= 3:
            return shape(node)[view.channel_dim(node)]
    return None


def _output_channels(view: View, default: int) -> int:
    out = view.nodes[-1].args[0]
    return shape(out)[view.channel_dim(out)] if isinstance(out, fx.Node) and is_tensor(out) else default


class _Stages:
    """Stage numbers as timm's ``out_indices``, or from the reduction where a model has no feature info."""

    def __init__(self, model: nn.Module, traces: Traces, input_size: tuple[int, ...]) -> None:
        info = getattr(model, "feature_info", None)
        info = getattr(info, "info", info)
        self.ends: list[int] = []
        self.input_size = input_size
        calls: list[Call] = [c for group in traces.calls.values() for c in group]
        if isinstance(info, (list, tuple)):
            for entry in info:
                name = entry.get("module", "") if isinstance(entry, dict) else ""
                inside = [c.end for c in calls if c.path == name or c.path.startswith(name + ".")]
                self.ends.append(max(inside) if name and inside else -1)  # -1: not called, so nothing is in it
            if max(self.ends, default=-1) < 0:
                self.ends = []

    def position(self, place: Place) -> int:
        view = place.candidate.view
        calls = (view.call_of(n) for n in view.calls_before(place.node))
        return next((c.begin for c in calls if c.path), view.call.begin)  # a marker's call has no path

    def of(self, place: Place) -> int:
        if self.ends:
            position = self.position(place)
            return next((i for i, end in enumerate(self.ends) if position <= end), len(self.ends))
        view = place.candidate.view
        dims, dim = shape(place.node), view.channel_dim(place.node)
        size = [d for i, d in enumerate(dims) if i not in (0, dim)]
        side = size[0] if len(size) > 1 else math.sqrt(size[0]) if size else 1
        return max(round(math.log2(max(self.input_size[1] / max(side, 1), 1))) - 1, 0)
