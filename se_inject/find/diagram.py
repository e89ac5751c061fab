"""A unit and its block as lines of text: the chains from its input, where they join, and where the gate is."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx, nn

from ..dataflow.module_graph import ModuleGraph
from ..dataflow.ops import argument, name_of, of
from .places import Place


def draw(place: Place, gate: str) -> str:
    """The unit of `place`, with `gate` for its block.

    Names are those of the owner's children and of the functions that it calls; changes of layout, slices
    and identities are left out.
    """
    unit, view = place.unit, place.unit.view
    operands = [] if unit.merge is None else _operands(unit.merge)
    joined = unit.merge is not None and name_of(unit.merge) == "cat"
    if unit.kind == "residual":
        operands = [unit.output, *unit.shortcuts]
    elif joined and unit.output in operands:  # new features
        return _lines([_chain(place, view, unit.output, unit.fork, gate, unit.branch), ["other features"]], "cat", [])
    if unit.merge is None or not (joined or unit.kind == "residual" or unit.merge is unit.output):
        return _lines([_chain(place, view, unit.output, unit.fork, gate)], "", [])
    fork = view.fork(operands)
    chains = [_chain(place, view, o, fork, gate) for o in operands]
    behind = _chain(place, view, _end(place), unit.merge, gate) if _end(place) is not unit.merge else []
    if place.view is view and place.node is unit.merge:
        behind = [gate, *behind]
    return _lines(chains, "cat" if joined else "+", behind)


def _operands(merge: fx.Node) -> list[fx.Node]:
    first = argument(merge, "tensors")
    return [o for o in (first if isinstance(first, (list, tuple)) else merge.all_input_nodes) if isinstance(o, fx.Node)]


def _end(place: Place) -> fx.Node:
    """The end of the drawing: the join, or the last value of the unit behind it."""
    unit = place.unit
    assert unit.merge is not None
    for node in (place.node, unit.output):
        if node in unit.view.index and unit.view.ancestors[unit.view.index[node]] >> unit.view.index[unit.merge] & 1:
            return node
    return unit.merge


def _chain(
    place: Place, view: ModuleGraph, end: fx.Node, start: fx.Node | None, gate: str, within: int = -1
) -> list[str]:
    """The names on the chain from `start` to `end`, or on its part in the mask `within`, with the gate where it is on it."""
    names: list[str] = []
    at, behind = end, None
    holder = _outermost_child(place, view)
    while True:
        here = view is place.view and at is place.node and (at is not start or _on_this_chain(place, behind))
        if here:
            names.append(gate)
        if at is start or at.op == "placeholder" or not within >> view.index[at] & 1:
            break
        if (at.op == "call_module" and type(view.call_of(at).module) is nn.Identity) or (here and place.fill is not None):
            pass
        elif at.op == "call_module" and view.call_of(at).module is holder:
            inner = place.view.nodes[-1].args[0]
            assert isinstance(inner, fx.Node)
            names.append(f"{at.target}({' ─ '.join(_chain(place, place.view, inner, None, gate))})")
        elif at.op == "call_module":
            names.append(str(at.target))
        elif at.op in ("call_function", "call_method") and not _is_silent(at):
            name = at.target if isinstance(at.target, str) else getattr(at.target, "__name__", str(at.target))
            names.append(name_of(at) or name.strip("_"))
        sources = [s for s in view.sources(at) if view.moves(s)]
        if not sources:
            break
        at, behind = max(sources, key=view.index.__getitem__), at
    return names[::-1]


def _is_silent(node: fx.Node) -> bool:
    """Whether a drawing leaves an operator out: changes of layout, parts, and questions about sizes."""
    op = of(node)
    return op.views or op.casts or op.slices or op.asks


def _on_this_chain(place: Place, behind: fx.Node | None) -> bool:
    """Whether a gate on the input of several chains is on the one with `behind`; None is the join."""
    return place.users is None or (behind in place.users if behind is not None else place.unit.merge in place.users)


def _outermost_child(place: Place, view: ModuleGraph) -> object:
    """The child of `view` that holds the place of the block, if it is not in `view` itself."""
    call = place.view.call
    while call.parent is not None and call.parent is not view.call:
        call = call.parent
    return call.module if call.parent is not None and place.view is not view else None


def _lines(chains: list[list[str]], join: str, behind: Iterable[str]) -> str:
    end = "".join(f" ─ {name}" for name in behind)
    bodies = [" ─ ".join(names) for names in chains]
    if len(chains) == 1:
        return f"x ─ {bodies[0]}{' ─ ' + join if join else ''}{end}"
    width = max(map(len, bodies)) + 1
    lines = []
    for i, body in enumerate(bodies):
        last = i == len(bodies) - 1
        left = "x ─┬─" if i == 0 else "   └─" if last else "   ├─"
        right = "─┐" if i == 0 else f"─┴─ {join}{end}" if last else "─┤"
        middle = f" {body} " if body else "─"
        lines.append(f"{left}{middle}{'─' * (width + 1 - len(middle))}{right}")
    return "\n".join(lines)
