"""The sites of a model: from its units, the block of each, or why there is none."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from torch import fx, nn

from ..blocks.build import block_spec, changes_its_input, cost, problem
from ..blocks.catalogue import get_block
from ..blocks.squeeze_excite import CONVS
from ..capture.calls import Call
from ..capture.channels import batch_is_first, channel_axis
from ..config import SEConfig
from ..dataflow.module_graph import ModuleGraph, TracedModel
from ..dataflow.ops import is_tensor, shape
from ..site import Site
from .attention import Gates
from .diagram import draw
from .placement import find_place, mask_argument
from .places import Place, PlacedSite
from .plan import rejected
from .stages import Stages
from .units import find_units, find_untraced, map_of


def find_sites(
    model: nn.Module, traced: TracedModel, config: SEConfig, *, taken: Mapping[nn.Module, str], drawn: bool = False
) -> tuple[list[PlacedSite], list[Site]]:
    """All sites of a recorded model, in the order of execution, the skipped ones with their reason.

    Args:
        model: The model that was recorded.
        traced: Its traces.
        config: Where blocks go, and which.
        taken: Owners that have blocks already, each with the path of one.
        drawn: Whether each site gets its drawing.

    Returns:
        (sites, untraced): the sites with their places, and one ``unknown`` site for each module whose forward cannot be
        traced.
    """
    gates = Gates(traced)
    units, slots = find_units(traced, gates, config)
    stages = Stages(model, traced)
    by_owner: dict[nn.Module, list[Place]] = defaultdict(list)
    for place in _distinct([find_place(c, slots.get(c.view.module), config.placement, traced) for c in units]):
        by_owner[place.view.module].append(place)
    out: list[PlacedSite] = []
    for module, group in by_owner.items():
        group.sort(key=lambda p: p.view.index[p.node])
        for place, name in zip(group, _slot_names(module, group)):
            reason = _why_not(place, gates, config, taken)
            out.append(PlacedSite(_site(place, name, reason, stages, config, drawn), place, _gain(place)))
    out.sort(key=lambda s: stages.position(s.place))
    return out, [_unknown(call, why, stages) for call, why in find_untraced(traced, units)]


def _unknown(call: Call, why: str, stages: Stages) -> Site:
    value = map_of(call)
    assert value is not None
    dims, dim = tuple(value.shape), channel_axis(value)
    dim = 1 if dim is None and len(dims) == 4 else len(dims) - 1 if dim is None else dim
    size = _positions(dims, dim)
    return Site(
        path=f"{call.path}.se" if call.path else "se", owner=call.path, slot="se", kind="unknown", channels=dims[dim],
        layout=_layout(dims, dim), size=size, stage=stages.at(call.end, size),
        style="se", rd_channels=0, params=0, macs=0, reason=why)


def _layout(dims: Sequence[int], channels: int) -> str:
    """The letters of the axes; an unknown one is a question mark."""
    positions = {3: "L", 4: "HW", 5: "DHW"}.get(len(dims), "?")
    return f"NC{positions}" if channels == 1 else f"N{positions}C"


def _positions(dims: Sequence[int], channels: int) -> tuple[int, ...]:
    return tuple(d for i, d in enumerate(dims) if i not in (0, channels))


def _distinct(places: list[Place]) -> list[Place]:
    """One place for each gated tensor: two slices of one tensor (DPN), or two branches from one input, share a place."""
    found: dict[tuple[int, fx.Node], Place] = {}
    for p in places:
        key = (id(p.view), p.node)
        if key not in found or (found[key].reason is not None and p.reason is None):
            found[key] = p
        elif p.reason is None:
            users = found[key].users
            both = None if users is None or p.users is None else list(dict.fromkeys([*users, *p.users]))
            found[key] = dataclasses.replace(found[key], users=both)
    return list(found.values())


def _slot_names(module: nn.Module, places: list[Place]) -> list[str]:
    """``se``, or ``se1``, ``se2``, ... for several in one owner, without names that the owner uses.

    Places without a block are named last, so that they change no other name.
    """
    if places[0].fill is not None:
        return [places[0].fill.name]
    real = [p for p in places if p.unit.reason is None]
    order = [*real, *(p for p in places if p.unit.reason is not None)]
    taken = {*dir(type(module)), *module.__dict__, *module._modules, *module._parameters, *module._buffers}
    names = (f"se{i}" for i in itertools.count(1) if f"se{i}" not in taken)
    named: dict[int, str] = {}
    if len(real) < 2 and "se" not in taken:
        named[id(order[0])] = "se"
        next(names)
    for p in order:
        if id(p) not in named:
            named[id(p)] = next(names)
    return [named[id(p)] for p in places]


def _site(place: Place, slot: str, reason: str | None, stages: Stages, config: SEConfig, drawn: bool) -> Site:
    c, view = place.unit, place.view
    dims, dim = shape(place.node), view.channel_dim(place.node)
    channels, layout, size = dims[dim], _layout(dims, dim), _positions(dims, dim)
    wide = channels >= (out := _output_channels(c.view, channels))  # no narrow middle of a bottleneck
    base = (_input_channels(c.view) or channels) if place.inner and wide else channels
    style = "efficientnet" if place.inner and layout in CONVS and (place.depthwise or channels > out) else "se"
    spec = block_spec(config, channels, base, layout, style, from_input=place.inner)
    params, macs = cost(spec, config, size) if reason is None else (0, 0)
    gate = f"[{config.block.upper()} {channels}{f' to {spec.rd_channels}' if spec.rd_channels else ''}]"
    site = Site(
        path=f"{view.path}.{slot}" if view.path else slot, owner=view.path, slot=slot, kind=c.kind, channels=channels,
        layout=layout, size=size, stage=stages.of(place), style=spec.style, rd_channels=spec.rd_channels,
        params=params, macs=len(view.traces.calls[view.module]) * macs, reason=reason, replaces=_replaced(place),
        drawing=draw(place, gate) if drawn else "")
    return site if reason is not None else dataclasses.replace(site, reason=rejected(config, site))


def _why_not(place: Place, gates: Gates, config: SEConfig, taken: Mapping[nn.Module, str]) -> str | None:
    """Why a place gets no block, whatever the filters say; None where it may."""
    c, view = place.unit, place.view
    known = place.reason or c.reason
    if known is not None:
        return known
    dims, dim, dtype = shape(place.node), view.channel_dim(place.node), place.node.meta["val"].dtype
    if not dtype.is_floating_point:
        return f"its tensor is of {dtype}, which a block does not take"
    if view.module in taken:
        return f"already has channel attention at {taken[view.module]}"
    there = gates.in_region(c.view, c.branch) or _gated_behind(view, place.node, gates)
    if there is not None and config.existing == "skip":
        return f"already has channel attention at {there}"
    if there is not None and config.existing == "replace" and not (place.fill and place.fill.replaces):
        return f"its channel attention is no module that could be swapped at {there}"
    if place.fill is None and any(call.changes_list for call in view.traces.calls[view.module]):
        return f"{type(view.module).__name__}.forward changes a list that it is given"
    if len(dims) != 4 and math.prod(_positions(dims, dim)) == 1:
        return "only one position: nothing to squeeze"
    if len(dims) != 4 and get_block(config.block).positions:
        found = "a sequence of tokens" if len(dims) == 3 and dim == 2 else f"of shape {dims}"
        return f"block={config.block!r} needs a map with height and width, and this is {found}"
    if len(dims) == 3 and (masked := _masked_by(place, tokens=dim == 2)) is not None:
        return masked
    if place.fill is not None and place.fill.gain != 1.0 and (why := problem(config, place.fill.gain)):
        return why
    if place.users is not None and not {*place.node.users} <= {*place.users} and changes_its_input(config):
        return f"block={config.block!r} writes into its input, which is read elsewhere, too"
    if not all(batch_is_first(n.meta["val"]) for n in _values(place, dims)):
        return f"the batch is not the first axis of its tensor, of shape {dims}"
    if dim not in (1, len(dims) - 1) or not 3 <= len(dims) <= 5:
        return f"layout of shape {dims} is not known"
    return None


def _masked_by(place: Place, tokens: bool) -> str | None:
    """Why a block could not leave out padding: the mask is given to a caller of the forward that calls the block.

    A block on tokens (N, L, C) gets the mask that its own forward has.
    """
    call: Call | None = place.view.call
    while call is not None:
        name = mask_argument(call.module)
        if name is not None:
            if tokens and call is place.view.call and place.fill is None:
                return None
            return f"{call.path or type(call.module).__name__}.forward takes {name}, which the block would not get"
        call = call.parent
    return None


def _gain(place: Place) -> float:
    return 1.0 if place.fill is None else place.fill.gain


def _replaced(place: Place) -> tuple[str, ...]:
    """The tensors of the attention that a block replaces."""
    if place.fill is None or not place.fill.replaces:
        return ()
    old = place.view.module.get_submodule(place.fill.name)
    owner = f"{place.view.path}." if place.view.path else ""
    return tuple(f"{owner}{place.fill.name}.{key}" for key in old.state_dict())


def _values(place: Place, dims: tuple[int, ...]) -> list[fx.Node]:
    """The gated value, and the sum that it goes into where that has the same shape, and may know more about the axes."""
    return [n for n in (place.node, place.unit.merge) if n is not None and is_tensor(n) and shape(n) == dims]


def _gated_behind(view: ModuleGraph, node: fx.Node, gates: Gates) -> str | None:
    for user in node.users:
        if user.op == "call_module" and view.call_of(user).module in gates.nodes:
            return str(view.call_of(user).path)
    return None


def _input_channels(view: ModuleGraph) -> int | None:
    for node in view.nodes:
        if node.op == "placeholder" and is_tensor(node) and len(shape(node)) >= 3:
            return shape(node)[view.channel_dim(node)]
    return None


def _output_channels(view: ModuleGraph, default: int) -> int:
    out = view.nodes[-1].args[0]
    if not isinstance(out, fx.Node) or not is_tensor(out) or len(shape(out)) < 2:
        return default
    return shape(out)[view.channel_dim(out)]
