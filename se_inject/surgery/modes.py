"""An owner's forward in eval and in train mode, traced for rewriting.

Where the two differ by what draws random numbers alone, as dropout and drop path that a forward calls as functions, the
generated forward has one graph for each mode.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
import sys
from collections import Counter
from collections.abc import Collection
from typing import Any

from torch import fx, nn

from ..capture.arguments import is_plain, optional_tensors, pinned, variadic_keywords
from ..capture.graphs import counterparts
from ..capture.passed_on import PassedOn, passing
from ..capture.tracer import samples
from ..dataflow.branches import Branch, same_branches, trace_branches
from ..dataflow.ops import draws, writes
from ..errors import Refusal
from .state import Edit

_AGAIN = 3  # traces in train mode, which are equal unless random numbers that a trace does not see are in them


@dataclasses.dataclass(frozen=True)
class Modes:
    """The forward of an owner, traced.

    Attributes:
        branches: Those in eval mode.
        training: Those in train mode, where they differ from those in eval mode; else none.
        fixed: The arguments that the branches hold fixed; with a `PassedOn` for those that they pass on.
        given: Those that are None by default, and that the branches hold for tensors.
    """

    branches: list[Branch]
    training: list[Branch]
    fixed: dict[str, Any]
    given: tuple[str, ...]


def trace_modes(
    module: nn.Module, constants: dict[str, Any], known: Branch | None = None, forms: Collection[tuple[str, str]] = ()
) -> Modes:  # fmt: skip
    """Trace an owner for rewriting, in both modes.

    An argument stays open where the forward does not branch on it, and ``**kwargs`` where it only passes them on, to
    children of one form each in `forms`. `known` is the only branch in eval mode with `constants`, where it is at hand. Use
    it inside `on_meta`, which gives the modes back.

    Raises:
        Refusal: fx cannot follow the forward, or it does something else in train mode than in eval mode, beside drawing.
    """
    branches = trace_branches(module, constants) if known is None else [known]
    name = variadic_keywords(type(module))
    if name is not None and not constants[name]:  # else a call without them may get children's outputs of another form
        with contextlib.suppress(Refusal):
            passed_on = {**constants, name: PassedOn()}
            traced = trace_branches(module, passed_on)
            if same_branches(branches, traced, constants):
                modes = _trace_modes(module, passed_on, traced)
                children = Counter(target for target, _ in forms)
                graphs = [b.graph for b in (*modes.branches, *modes.training) if b.graph is not None]
                if all(children[str(n.target)] == 1 for graph in graphs for n in passing(graph)):
                    return modes
    return _trace_modes(module, constants, branches)


def _trace_modes(module: nn.Module, constants: dict[str, Any], branches: list[Branch]) -> Modes:
    modules = list(module.modules())
    for m in modules:
        m.__dict__["training"] = False
    held = pinned(type(module), constants)
    free = None
    with contextlib.suppress(Refusal):
        free = branches if constants.keys() == held.keys() else trace_branches(
            module, held, unknown=constants.keys() - held.keys())
    if free is not None and same_branches(branches, free, constants):
        branches, fixed = free, held
    else:
        fixed = constants
    if not all(is_plain(value) or isinstance(value, PassedOn) for value in fixed.values()):
        raise Refusal(f"{type(module).__name__}.forward depends on an argument that is no plain value")
    graphs = [b.graph for b in branches if b.graph is not None]
    given = tuple(name for name in optional_tensors(type(module), constants, graphs)
                  if not _is_same_with_none(module, branches, fixed, name))
    for m in modules:
        m.__dict__["training"] = True
    with contextlib.suppress(Refusal):
        if same_branches(branches, trace_branches(module, fixed), {}):
            return Modes(branches, [], fixed, given)
    training = trace_branches(module, fixed, drawing=True)
    why = _why_not_both(module, branches, training)
    again = () if why else (trace_branches(module, fixed, drawing=True) for _ in range(_AGAIN))
    if not all(same_branches(training, other, {}) for other in again):
        why = "it draws random numbers that a trace does not see"
    for own, found in ((True, training), (False, branches)):
        for m in modules:
            m.__dict__["training"] = own == (m is module)
        if not why and not same_branches(found, trace_branches(module, fixed, drawing=own), {}):
            why = "it asks for the mode of a layer, which may have one of its own"
    if why:
        raise Refusal(f"{type(module).__name__}.forward differs between train and eval mode: {why}")
    return Modes(branches, training, fixed, given)


def _is_same_with_none(module: nn.Module, branches: list[Branch], fixed: dict[str, Any], name: str) -> bool:
    """Whether a forward does the same where an argument, a tensor in `branches`, is None."""
    with contextlib.suppress(Refusal):
        return same_branches(trace_branches(module, {**fixed, name: None}), branches, {name: None})
    return False


def _why_not_both(module: nn.Module, evaluated: list[Branch], trained: list[Branch]) -> str:
    """Why a generated forward cannot hold both modes; empty where it can: the same layers, and further nodes that draw."""
    numpy = sys.modules.get("numpy.random")
    generators = (random.Random, *(() if numpy is None else (numpy.Generator, numpy.RandomState)))
    if any(isinstance(value, generators) for value in module.__dict__.values()):
        return "it may draw random numbers that a trace does not see"
    if [b.outcomes for b in evaluated] != [b.outcomes for b in trained]:
        return "it has other branches"
    for a, b in zip(evaluated, trained):
        if (a.graph is None) != (b.graph is None):
            return "it can be traced in only one of them"
        if a.graph is None or b.graph is None:
            continue
        if _layers(a.graph) != _layers(b.graph):
            return "it calls other layers"
        known = set(_pairs(a.graph, b.graph).values())
        if any(not any(map(_is_drawn, group)) for group in _groups([n for n in b.graph.nodes if n not in known])):
            return "it does something else than to draw random numbers"
    return ""


def _layers(graph: fx.Graph) -> list[tuple[str, object]]:
    """The layers that a trace calls and the tensors that it reads, in order."""
    return [(n.op, n.target) for n in graph.nodes if n.op in ("call_module", "get_attr")]


def _is_drawn(node: fx.Node) -> bool:
    return draws(node) or (node.op == "call_function" and samples(node.target))


def _groups(nodes: list[fx.Node]) -> list[set[fx.Node]]:
    """The nodes, those together that read one another."""
    groups: list[set[fx.Node]] = []
    for node in nodes:
        near = {node, *(n for n in (*node.all_input_nodes, *node.users) if n in nodes)}
        touched = [g for g in groups if g & near]
        groups = [g for g in groups if not g & near] + [near.union(*touched)]
    return groups


def _pairs(evaluated: fx.Graph, trained: fx.Graph) -> dict[fx.Node, fx.Node]:
    """The nodes of a forward in eval mode, by which those in train mode are found."""
    return {**counterparts(evaluated, trained), **_called_once(evaluated, trained)}


def in_train_mode(edits: tuple[Edit, ...], evaluated: fx.Graph, trained: fx.Graph, module: nn.Module) -> tuple[Edit, ...]:
    """The edits of a forward in eval mode, for its trace in train mode, in which dropout and the like are further nodes.

    Raises:
        Refusal: A gated value, or its readers that alone get the gated value, are not clear there.
    """
    pairs = _pairs(evaluated, trained)
    index = {node: i for i, node in enumerate(trained.nodes)}
    nodes = list(evaluated.nodes)
    known = set(pairs.values())
    out = []
    for edit in edits:
        node = nodes[edit.node]
        there = pairs.get(node)
        users = None if edit.users is None else {nodes[i] for i in edit.users}
        if users is not None and users != set(node.users) and there is not None:
            gated = _readers(there, {pairs.get(u) for u in users}, known)
            drawn = [n for n in trained.nodes if n not in known]  # what these write its other readers would not see
            may_write = any(map(writes, drawn)) or any(samples(u.target) for u in there.users)
            there = None if gated is None or may_write else there
        else:
            gated = None
        if there is None:
            raise Refusal(
                f"{type(module).__name__}.forward differs between train and eval mode, and in train mode the place of "
                f"{edit.slot!r} cannot be found")
        out.append(dataclasses.replace(
            edit, node=index[there], name=there.name, users=None if gated is None else tuple(index[u] for u in gated)))
    return tuple(out)


def _called_once(a: fx.Graph, b: fx.Graph) -> dict[fx.Node, fx.Node]:
    """The calls of layers that each of two graphs calls once."""
    calls: list[dict[object, list[fx.Node]]] = [{}, {}]
    for graph, found in zip((a, b), calls):
        for node in graph.nodes:
            if node.op == "call_module":
                found.setdefault(node.target, []).append(node)
    return {n[0]: calls[1][key][0] for key, n in calls[0].items() if len(n) == len(calls[1].get(key, ())) == 1}


def _readers(node: fx.Node, wanted: set[fx.Node | None], known: set[fx.Node]) -> list[fx.Node] | None:
    """The readers of a node that pass its value to the `wanted` nodes alone. Nodes that are not `known` may stand between.

    None where a reader also passes it to other nodes, or where no reader passes it to a wanted node.
    """
    gated, reached = [], set[fx.Node | None]()
    for user in node.users:
        found, todo = set[fx.Node | None](), [user]
        while todo:
            n = todo.pop()
            if n in known:
                found.add(n)
            else:
                todo += n.users
        if found <= wanted:
            gated.append(user)
            reached |= found
        elif found & wanted:
            return None
    return gated if reached == wanted else None
