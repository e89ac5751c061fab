"""The exact place of a block in its unit: the paper's placements, found in the owner's graph or in a child's."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from ..blocks.masks import MASKS
from ..capture.arguments import signature_of
from ..capture.author_code import functions_of, names_in
from ..capture.forward import is_plain_sequential
from ..dataflow.aliasing import is_read_elsewhere
from ..dataflow.layers import is_conv, is_depthwise, mixes
from ..dataflow.module_graph import LAYOUT, SLICE, ModuleGraph, TracedModel
from ..dataflow.ops import is_tensor, name_of, shape
from ..errors import Refusal
from ..private import DropoutNd
from .patterns import Candidate
from .places import Place
from .slots import Slot, is_inner

IN_PLACE = "its tensor is changed in place, and read where a gate would not reach"
NO_CONV = "placement='inner' needs one convolution over space that the whole branch goes through"


def find_place(c: Candidate, slot: Slot | None, placement: str, traces: TracedModel) -> Place:
    """The place of a unit's block; with a reason where there can be no block."""
    view = c.view
    if slot is not None:
        conv = _conv_before(view, slot.node)
        inner = slot.name == "se" and is_inner(slot)
        depthwise = inner and conv is not None and is_depthwise(conv)
        reason = IN_PLACE if is_read_elsewhere(slot.view, slot.node) else None
        return Place(c, slot.view, slot.node, fill=slot, inner=inner, depthwise=depthwise, reason=reason)
    place = _place(c, placement, traces)
    if place.reason is None and c.reason is None:
        place = _where_all_methods_pass(place, traces)
        if is_read_elsewhere(place.view, place.node) or (place.users is not None and place.view.is_written_after(place.node)):
            place = dataclasses.replace(place, reason=IN_PLACE)
    return place


def _place(c: Candidate, placement: str, traces: TracedModel) -> Place:
    view = c.view
    merges = [u for u in c.output.users if c.merge is not None and view.ancestors[view.index[c.merge]]
              >> view.index[u] & 1]
    if placement == "inner" and c.kind != "conv":
        found = _inner(traces, view, c.output, c.branch)
        if found is None or (found[1] is c.output and c.output is c.merge):  # its convolutions are parallel
            return Place(c, view, c.output, reason=NO_CONV)
        inside, node, conv = found
        return Place(c, inside, node, inner=conv, depthwise=conv)
    if placement == "pre":
        if c.fork is None or not is_tensor(c.fork):
            return Place(c, view, c.output, reason="placement='pre' needs a branch that starts from one tensor of its forward")
        return Place(c, view, c.fork, [u for u in c.fork.users if c.branch >> view.index[u] & 1])
    if placement == "identity":
        if c.kind != "residual" or c.merge is None:
            return Place(c, view, c.output, reason="placement='identity' needs a shortcut")
        shortcut = c.shortcuts[0]
        return Place(c, view, shortcut, [
            u for u in shortcut.users if not c.branch >> view.index[u] & 1
            and view.ancestors[view.index[c.merge]] >> view.index[u] & 1])
    if placement == "post" and c.kind == "residual":
        assert c.merge is not None
        end = c.merge
        users = list(end.users)
        if len(users) == 1 and view.is_nonlinear(users[0]) and not view.is_learned(users[0]) and \
                is_tensor(users[0]) and shape(users[0]) == shape(end):
            end = users[0]
        return Place(c, view, end)
    if placement == "post":
        return Place(c, view, c.output)
    end_view, node, behind, sliced = _walk_back(traces, view, c.output, c.branch)
    if sliced or c.kind != "residual" or end_view.is_written_after(node):
        return Place(c, end_view, node)
    return Place(c, end_view, node, [behind] if behind is not None else merges or None)


def _walk_back(
    traces: TracedModel, view: ModuleGraph, end: fx.Node, branch: int
) -> tuple[ModuleGraph, fx.Node, fx.Node | None, bool]:
    """The last value of a branch before its drop path, layer scale, gain and channel slice.

    Changes of layout are passed where one of those comes before them, and a child is entered where it ends with one.

    Returns:
        The forward and the node, the node that reads it on the chain to `end`, and whether a slice was passed.
    """
    node, behind, sliced = end, None, False
    cut = layout = False
    for step in view.steps_back(end):
        if not branch >> view.index[step.source] & 1 or not is_tensor(step.source):
            break
        if step.kind == LAYOUT:
            if len(step.source.users) > 1:
                break
            layout = True
            continue
        if step.kind == SLICE:
            if not _slices_channels(view, step.node, step.source):
                break
            cut = True
        elif layout and not _is_drop_or_scale(view, step.node):
            continue
        node, behind, sliced, layout = step.source, step.node, cut, False
    inside = None if len(shape(node)) == 3 and mask_argument(view.module) else _child(traces, view, node)
    if inside is not None:  # and the mask of padding stays here, where the block gets it
        out = inside.nodes[-1].args[0]
        if isinstance(out, fx.Node) and is_tensor(out):
            mask = (1 << len(inside.nodes)) - 1
            child, n, last, part = _walk_back(traces, inside, out, mask)
            if child is not inside or any(_is_drop_or_scale(inside, m) for m in _chain(inside, out, n)):
                return child, n, last, part
    return view, node, behind, sliced


def mask_argument(module: nn.Module) -> str | None:
    """The argument by which a module's forward takes a mask of padding."""
    with contextlib.suppress(Refusal):  # it has no forward to read, so none that gives a mask on
        return next((p for p in signature_of(type(module).forward).parameters if p in MASKS), None)
    return None


def _chain(view: ModuleGraph, end: fx.Node, start: fx.Node) -> Iterator[fx.Node]:
    """The nodes of a chain from `end` back to `start`, without `start`."""
    while end is not start:
        yield end
        end = next(s for s in view.sources(end) if view.ancestors[view.index[s]] >> view.index[start] & 1)


def _is_drop_or_scale(view: ModuleGraph, node: fx.Node) -> bool:
    """Whether a node is a drop path, a layer scale or a gain, and not merely a dropout or an identity."""
    if node.op != "call_module":
        return view.scaled(node) is not None
    return view.passes(node) and not isinstance(view.call_of(node).module, (nn.Identity, DropoutNd))


def _slices_channels(view: ModuleGraph, node: fx.Node, source: fx.Node) -> bool:
    a, b, dim = shape(source), shape(node), view.channel_dim(source)
    return len(a) == len(b) and a[dim] > b[dim] and all(a[d] == b[d] for d in range(len(a)) if d != dim)


def _child(traces: TracedModel, view: ModuleGraph, node: fx.Node) -> ModuleGraph | None:
    """The forward of a child that is called once, by `node` with one tensor."""
    if node.op != "call_module" or len(traces.calls.get(view.call_of(node).module, ())) != 1:
        return None
    return traces.view(view.call_of(node).module)


def _inner(traces: TracedModel, view: ModuleGraph, end: fx.Node, branch: int) -> tuple[ModuleGraph, fx.Node, bool] | None:
    """The value behind the last convolution over space that the branch to `end` passes, with its norm and activation.

    Where parallel convolutions are joined by a concat, the value is the concat.

    Returns:
        The forward and the node, and whether that convolution is depthwise.
    """
    at = end
    while branch >> view.index[at] & 1:
        if at.op == "call_module":
            layers = [c.module for c in view.call_of(at).walk() if mixes(c.module)]
            if layers and is_conv(layers[-1]) and is_tensor(at):
                return view, _with_norm_and_act(view, at, branch), is_depthwise(layers[-1])
            child = _child(traces, view, at) if any(map(is_conv, layers)) else None
            out = None if child is None else child.nodes[-1].args[0]
            if child is not None and isinstance(out, fx.Node):
                found = _inner(traces, child, out, (1 << len(child.nodes)) - 1)
                if found is not None:
                    return found
        sources = [s for s in view.sources(at) if view.moves(s)]
        if not sources:
            return None
        if len(sources) == 1:
            at = sources[0]
            continue
        fork = view.fork(sources)
        if name_of(at) == "cat" and is_tensor(at):
            between = view.region(at, fork)
            convs = [c.module for call in view.calls(between) for c in call.walk() if is_conv(c.module)]
            if convs:
                return view, at, False
        if fork is None:
            return None
        at = fork
    return None


def _with_norm_and_act(view: ModuleGraph, node: fx.Node, branch: int) -> fx.Node:
    """The end of the norm and the activation that follow a layer, in the branch; not of drop path or layer scale."""
    end = at = node
    while len(at.users) == 1:
        (user,) = at.users
        if not branch >> view.index[user] & 1 or view.is_learned(user) or not is_tensor(user) or shape(user) != shape(at):
            break
        if user.op != "call_module" and not view.is_nonlinear(user):
            break
        at = user
        if user.op != "call_module" or not view.passes(user):
            end = at
    return end


def _conv_before(view: ModuleGraph, node: fx.Node) -> nn.Module | None:
    """The last convolution over space before a node."""
    for earlier in view.calls_before(node):
        convs = [c.module for c in view.call_of(earlier).walk() if is_conv(c.module)]
        if convs:
            return convs[-1]
    return None


def _where_all_methods_pass(place: Place, traces: TracedModel) -> Place:
    """The place, moved into a child where the owner has a method beside `forward` that would miss the block."""
    view, node, moved = place.view, place.node, False
    while _other_method(view) or (moved and is_plain_sequential(view.module)):
        child = _child(traces, view, node)
        out = None if child is None else child.nodes[-1].args[0]
        if child is None or not isinstance(out, fx.Node) or not is_tensor(out):
            name = type(view.module).__name__
            return dataclasses.replace(
                place, reason=f"{name}.{_other_method(view)} does the work of forward, too, and would miss the block")
        view, node, moved = child, out, True
    return dataclasses.replace(place, view=view, node=node, users=None) if moved else place


def _other_method(view: ModuleGraph) -> str | None:
    """Name of a method of an owner that does the work of its forward, too."""
    return view.shared("other method", lambda: _find_other_method(type(view.module), view.call.parent is None))


def _find_other_method(cls: Any, is_root: bool) -> str | None:
    # methods that forward calls do not count; those of the model itself do, as users call them by name
    used: set[str] = set() if is_root else set().union(*map(names_in, functions_of(cls)))
    return next((
        name for name in sorted(dir(cls)) if name.startswith("forward_") and name not in used
        and callable(getattr(cls, name))), None)
