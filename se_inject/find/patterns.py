"""Candidates: where squeeze-and-excitation belongs in one traced forward.

Each pattern reads one owner's graph and yields candidates. `units` decides which of them count in the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import fx

from ..dataflow.module_graph import LAYOUT, SLICE, ModuleGraph
from ..dataflow.ops import argument, is_tensor, name_of, shape

LINEAR = "its branch is linear: a convolution or a position encoding in another form"
UNLEARNED = "no convolution or linear layer in its branch"


@dataclasses.dataclass(eq=False)
class Candidate:
    """A place in an owner's forward.

    Attributes:
        view: The owner's forward.
        kind: As `Site.kind`.
        output: The node where the branch ends.
        branch: Mask of the nodes of the branch.
        fork: The branch's input.
        merge: The sum or concat that the branch goes into.
        shortcuts: The other operands of the sum.
        reason: Why no block belongs there; None where one does.
    """

    view: ModuleGraph
    kind: str
    output: fx.Node
    branch: int
    fork: fx.Node | None = None
    merge: fx.Node | None = None
    shortcuts: tuple[fx.Node, ...] = ()
    reason: str | None = None


def candidates(view: ModuleGraph) -> list[Candidate]:
    """The residuals and aggregations of a forward, found once for all modules that share it."""
    found = view.shared("candidates", lambda: _candidates(view))
    return [dataclasses.replace(c, view=view) for c in found]


def _candidates(view: ModuleGraph) -> list[Candidate]:
    found = list(_residuals(view))
    return [*found, *_aggregations(view, found)]


def _operands(node: fx.Node) -> list[fx.Node] | None:
    """The operands of a sum of equal maps, if `node` is one: an addition, or the sum of a stack."""
    found: list[Any] = []
    name = name_of(node)
    if name == "add":
        found = [argument(node, "input"), argument(node, "other")]
    elif name == "sum" and name_of(first := argument(node, "input")) == "stack":
        parts = argument(first, "tensors")
        if len(first.users) == 1 and _dim(node) == _dim(first) and isinstance(parts, (list, tuple)):
            found = list(parts)
    if len(found) < 2 or not is_tensor(node) or not node.meta["val"].is_floating_point():
        return None
    return found if all(is_tensor(n) and shape(n) == shape(node) and len(shape(n)) >= 3 for n in found) else None


def _dim(node: fx.Node) -> object:
    dim = argument(node, "dim", 0)
    return dim[0] if isinstance(dim, (list, tuple)) and len(dim) == 1 else dim


def _terms(operands: list[fx.Node], partial: set[fx.Node]) -> list[fx.Node]:
    """The summands of a chain of sums, where nothing else uses the `partial` sums."""
    out: list[fx.Node] = []
    for arg in operands:
        nested = _operands(arg) if len(arg.users) == 1 else None
        if nested is None:
            out.append(arg)
        else:
            partial.add(arg)
            out += _terms(nested, partial)
    return out


def _residuals(view: ModuleGraph) -> Iterator[Candidate]:
    """Sums of a branch with learned, nonlinear work and a shortcut from the same fork.

    A sum of linear operands before the activation is one convolution written as several (RepVGG),
    or a position encoding. Where one operand is the input itself, it is reported with that reason.
    """
    partial: set[fx.Node] = set()
    for node in reversed(view.nodes):
        operands = None if node in partial else _operands(node)
        if operands is None:
            continue
        terms = _terms(operands, partial)
        data = [t for t in terms if view.moves(t)]
        if len(data) < 2:
            continue
        fork = view.fork(data)
        regions = {t: view.region(t, fork) for t in data}
        plain = [t for t in data if not view.learned(regions[t])]
        if fork is None and not (len(plain) == 1 == len(data) - 1 and _bare(view, plain[0], None)):
            continue
        branches = [t for t in data if t not in plain and view.nonlinear(regions[t])]
        if len(branches) > 1 and not plain:  # a projection with an activation is still the smaller operand
            work = {t: view.work(regions[t]) for t in branches}
            most = max(work.values())
            if list(work.values()).count(most) > 1:
                mask = 0
                for t in data:
                    mask |= regions[t]
                yield Candidate(view, "aggregation", node, mask | 1 << view.index[node], fork, node)
                continue
            branches = [t for t in branches if work[t] == most]
        reason = None
        if not branches and any(_bare(view, t, fork) for t in plain):
            branches = [t for t in data if not _bare(view, t, fork)]
            reason = LINEAR if any(t not in plain for t in branches) else UNLEARNED
        for t in branches:
            if fork is None and not any(
                    n.op == "placeholder" and is_tensor(n) for n in view.members(regions[t])):
                continue
            others = tuple(o for o in data if o is not t)
            yield Candidate(view, "residual", t, regions[t], fork, node, others, reason)


def _bare(view: ModuleGraph, node: fx.Node, fork: fx.Node | None) -> bool:
    """Whether `node` is the fork, or an input where there is no fork, or a part or a multiple of it."""
    for step in view.steps_back(node):
        if node is fork or step.kind == LAYOUT:
            break
        node = step.source
    return node is fork or node.op == "placeholder"


def _aggregations(view: ModuleGraph, residuals: list[Candidate]) -> Iterator[Candidate]:
    """Concats, over channels, of parallel branches.

    Where the concat feeds a learned layer (VoVNet), the unit ends behind that; where an operand is
    passed on untouched (DenseNet, ShuffleNetV2) or is a residual sum of a part of another (DPN), the
    units are the new features; else (Inception) the unit is the concat. `residuals` are the forward's.
    """
    sums = {c.merge: c for c in residuals}
    for node in view.nodes:
        if node.op == "call_module":
            yield from _fused_by_caller(view, node)
        if name_of(node) != "cat" or not is_tensor(node) or len(shape(node)) < 3:
            continue
        operands, dim = argument(node, "tensors"), argument(node, "dim", 0)
        if not isinstance(operands, (list, tuple)) or len(operands) < 2 or not all(is_tensor(o) for o in operands):
            continue
        if not isinstance(dim, int) or dim % len(shape(node)) != view.channel_dim(node):
            continue
        fork = view.fork(operands)  # type: ignore[arg-type]
        regions = {o: view.region(o, fork) for o in operands if isinstance(o, fx.Node)}
        learned = [o for o in regions if view.learned(regions[o])]
        working = [o for o in learned if view.nonlinear(regions[o])]
        if not working or (fork is None and len(working) < 2):
            continue
        mask = 1 << view.index[node]
        for region in regions.values():
            mask |= region
        end = fused(view, node)
        parts = [o for o in working if o not in sums]
        shared = [sums[o] for o in regions if o in sums and fork is not None and sums[o].fork is fork
                  and any(view.learned(sums[o].branch & regions[p]) for p in parts if _operands(p) is None)]
        if end is not None:
            yield Candidate(view, "aggregation", end, mask | view.region(end, node), fork, node)
        elif shared or (len(learned) < len(regions) and any(_bare_part(view, o, fork) for o in regions)):
            for o in parts:
                if shared and not any(view.learned(c.branch & regions[o]) for c in shared):
                    continue  # the shortcut's
                own = view.region(o, fork)
                for other in regions:  # new features that were computed from earlier ones
                    if other is not o and own >> view.index[other] & 1:
                        own &= ~view.ancestors[view.index[other]]
                yield Candidate(view, "aggregation", o, own, _only_input(view, own), node)
        else:
            yield Candidate(view, "aggregation", node, mask, fork, node)


def _bare_part(view: ModuleGraph, node: fx.Node, fork: fx.Node | None) -> bool:
    for step in view.steps_back(node):
        if node is fork or step.kind != SLICE:
            break
        node = step.source
    return node is fork or node.op == "placeholder"


def _only_input(view: ModuleGraph, mask: int) -> fx.Node | None:
    """The one activation from outside that a set of nodes is computed from."""
    outside = {s for n in view.members(mask) for s in view.sources(n) if not mask >> view.index[s] & 1}
    return outside.pop() if len(outside) == 1 else None


def fused(view: ModuleGraph, node: fx.Node) -> fx.Node | None:
    """The end of the single chain of layers behind a concat, if one of them is learned."""
    learned, end = False, node
    while len(end.users) == 1:
        (user,) = end.users
        if user.op == "output" or name_of(user) in ("add", "cat") or not is_tensor(user):
            break
        data = [n for n in user.all_input_nodes if is_tensor(n) and n.op != "get_attr"]
        if data != [end] or shape(user)[2:] != shape(node)[2:]:
            break
        learned |= view.is_learned(user)
        end = user
    return end if learned else None


def _fused_by_caller(view: ModuleGraph, node: fx.Node) -> Iterator[Candidate]:
    """The aggregation of a concat that the child called by `node` returns, where the next layer fuses it."""
    behind = next(iter(node.users)) if len(node.users) == 1 else None
    if behind is None or behind.op != "call_module" or view.work(1 << view.index[behind]) != 1:
        return
    child = view.traces.view(view.call_of(node).module)
    if child is not None and any(c.merge is child.nodes[-1].args[0] for c in candidates(child) if c.kind == "aggregation"):
        end = fused(view, node)
        if end is not None:
            yield Candidate(view, "aggregation", end, view.region(end, None), None, node)


def plain_convs(view: ModuleGraph) -> Iterator[Candidate]:
    """Convolutions over more than one position, each with its norm, up to its nonlinearity."""
    for node in view.nodes:
        if not is_tensor(node) or not 3 <= len(shape(node)) <= 5 or max(shape(node)[2:]) == 1:
            continue
        if not view.is_nonlinear(node) or view.is_learned(node):
            continue
        source, mask = node, 1 << view.index[node]
        while True:
            data = _activations(source)
            if len(data) != 1 or len(data[0].users) != 1:
                break
            source = data[0]
            mask |= 1 << view.index[source]
            if view.is_learned(source):
                module = view.call_of(source).module if source.op == "call_module" else None
                weight = None if module is None else module._parameters.get("weight")
                if weight is not None and weight.dim() == len(shape(node)) and shape(source)[1] == shape(node)[1]:
                    yield Candidate(view, "conv", node, mask, _activations(source)[0])
                break
            if view.is_nonlinear(source):
                break


def _activations(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if is_tensor(n) and n.op != "get_attr"]


def chain_end(view: ModuleGraph, kind: str = "inverted_residual") -> Candidate | None:
    """The whole forward as a branch without a shortcut, where it is one learned, nonlinear branch."""
    out = view.nodes[-1].args[0]
    inputs = [n for n in view.nodes if n.op == "placeholder" and is_tensor(n)]
    if not isinstance(out, fx.Node) or not is_tensor(out) or len(shape(out)) < 3 or len(inputs) != 1:
        return None
    mask = view.region(out, inputs[0])
    if not view.learned(mask) or not view.nonlinear(mask):
        return None
    return Candidate(view, kind, out, mask, inputs[0])


def is_inside(a: Candidate, b: Candidate) -> bool:
    """Whether a unit lies in another's branch, in one forward, and has no other use."""
    view = a.view
    if a.merge is b.merge is not None or not b.branch >> view.index[a.output] & 1:
        return False
    seen: set[fx.Node] = set()
    todo: list[fx.Node] = [a.merge or a.output]
    while todo:
        node = todo.pop()
        if node is b.output or node in seen:
            continue
        if node.op == "output":
            return False
        seen.add(node)
        todo += node.users
    return True
