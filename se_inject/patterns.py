"""The places where squeeze-and-excitation belongs, in one traced forward.

Each pattern reads one owner's graph and yields candidates; which of them become sites is decided
where all owners of the model are known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import fx

from .graph import _SLICES, ADDS, CATS, View, is_conv, is_depthwise, is_tensor, shape


@dataclasses.dataclass(eq=False)
class Candidate:
    """A place in an owner's forward.

    `branch` is the mask of the nodes that belong to the unit, `output` the node where the branch
    ends, `shortcuts` the other operands of the sum, `fork` the branch's input, `merge` the sum or
    concat that takes the branch in.
    """

    view: View
    kind: str
    output: fx.Node
    branch: int
    fork: fx.Node | None = None
    merge: fx.Node | None = None
    shortcuts: tuple[fx.Node, ...] = ()


def _same_map(a: object, b: object) -> bool:
    return is_tensor(a) and is_tensor(b) and shape(a) == shape(b) and len(shape(a)) >= 3  # type: ignore[arg-type]


def _is_sum(node: fx.Node) -> bool:
    return (
        node.op in ("call_function", "call_method") and node.target in ADDS and len(node.args) >= 2
        and _same_map(node.args[0], node.args[1]) and node.meta["val"].is_floating_point()
    )


def _terms(node: fx.Node) -> list[fx.Node]:
    """The summands of a chain of sums whose partial sums nothing else uses."""
    out: list[fx.Node] = []
    for arg in node.args[:2]:
        assert isinstance(arg, fx.Node)
        out += _terms(arg) if _is_sum(arg) and len(arg.users) == 1 else [arg]
    return out


def residuals(view: View) -> Iterator[Candidate]:
    """Sums of a branch with learned, nonlinear work and a shortcut from the same fork.

    A sum of linear operands before the activation is one convolution written as several (RepVGG),
    or a position encoding; it is no residual.
    """
    inner: set[fx.Node] = set()
    for node in reversed(view.nodes):
        if node in inner or not _is_sum(node):
            continue
        terms = _terms(node)
        inner.update(a for a in _chain(node))
        data = [t for t in terms if any(n.op in ("placeholder", "call_module") and view.carries_data(n)
                                        for n in view.members(view.ancestors[view.index[t]]))]
        if len(data) < 2:
            continue
        fork = view.fork(data)
        regions = {t: view.region(t, fork) for t in data}
        plain = [t for t in data if not view.learned(regions[t])]
        if fork is None and not (len(plain) == 1 == len(data) - 1 and _bare(plain[0])):
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
        for t in branches:
            if fork is None and not any(
                    n.op == "placeholder" and is_tensor(n) for n in view.members(regions[t])):
                continue
            yield Candidate(view, "residual", t, regions[t], fork, node, tuple(o for o in data if o is not t))


def _chain(node: fx.Node) -> Iterator[fx.Node]:
    for arg in node.args[:2]:
        if isinstance(arg, fx.Node) and _is_sum(arg) and len(arg.users) == 1:
            yield arg
            yield from _chain(arg)


def _bare(node: fx.Node) -> bool:
    while node.op != "placeholder":
        if node.target not in _SLICES or not isinstance(node.args[0], fx.Node):
            return False
        node = node.args[0]
    return True


def aggregations(view: View) -> Iterator[Candidate]:
    """Concats, over channels, of parallel branches.

    Where the concat feeds a learned layer (VoVNet), the unit ends behind that; where an operand is
    passed on untouched (DenseNet, ShuffleNetV2), the units are the new features; else (Inception)
    the unit is the concat.
    """
    merges = {c.merge for c in residuals(view)}
    for node in view.nodes:
        if node.op != "call_function" or node.target not in CATS or not is_tensor(node) or len(shape(node)) < 3:
            continue
        operands = node.args[0]
        if not isinstance(operands, (list, tuple)) or len(operands) < 2 or not all(is_tensor(o) for o in operands):
            continue
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        assert isinstance(dim, int)
        if dim % len(shape(node)) != view.channel_dim(node):
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
        end = _behind(view, node)
        if end is not None:
            yield Candidate(view, "aggregation", end, mask | view.region(end, node), fork, node)
        elif len(learned) < len(regions) and any(_untouched(o, fork) for o in regions):
            for o in working:
                if o in merges:  # a residual by itself, whose branch is gated
                    continue
                own = view.region(o, fork)
                for other in regions:  # new features that were computed from earlier ones
                    if other is not o and own >> view.index[other] & 1:
                        own &= ~view.ancestors[view.index[other]]
                yield Candidate(view, "aggregation", o, own, fork, node)
        else:
            yield Candidate(view, "aggregation", node, mask, fork, node)


def _untouched(node: fx.Node, fork: fx.Node | None) -> bool:
    while node is not fork and node.target in _SLICES and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node is fork or node.op == "placeholder"


def _behind(view: View, node: fx.Node) -> fx.Node | None:
    """The end of the single chain of layers behind `node`, if one of them is learned."""
    learned, end = False, node
    while len(end.users) == 1:
        (user,) = end.users
        if user.op == "output" or user.target in ADDS | CATS or not is_tensor(user):
            break
        data = [n for n in user.all_input_nodes if is_tensor(n) and n.op != "get_attr"]
        if data != [end] or shape(user)[2:] != shape(node)[2:]:
            break
        learned |= view.is_learned(user)
        end = user
    return end if learned else None


def plain_convs(view: View) -> Iterator[Candidate]:
    """Convolutions over more than one position, each with its norm, up to its nonlinearity."""
    for node in view.nodes:
        if not is_tensor(node) or len(shape(node)) != 4 or max(shape(node)[2:]) == 1:
            continue
        if not view.is_nonlinear(node) or view.is_learned(node):
            continue
        source, mask = node, 1 << view.index[node]
        while True:
            data = [n for n in source.all_input_nodes if is_tensor(n) and n.op != "get_attr"]
            if len(data) != 1 or len(data[0].users) != 1:
                break
            source = data[0]
            mask |= 1 << view.index[source]
            if view.is_learned(source):
                module = view.call_of(source).module if source.op == "call_module" else None
                weight = None if module is None else module._parameters.get("weight")
                if weight is not None and weight.dim() == 4 and shape(source)[1] == shape(node)[1]:
                    yield Candidate(view, "conv", node, mask, data[0])
                break
            if view.is_nonlinear(source):
                break


def chain_end(view: View) -> Candidate | None:
    """The whole forward as a branch without a shortcut, when it is one learned, nonlinear way."""
    out = view.nodes[-1].args[0]
    inputs = [n for n in view.nodes if n.op == "placeholder" and is_tensor(n)]
    if not isinstance(out, fx.Node) or not is_tensor(out) or len(shape(out)) < 3 or len(inputs) != 1:
        return None
    mask = view.region(out, inputs[0])
    if not view.learned(mask) or not view.nonlinear(mask):
        return None
    return Candidate(view, "inverted_residual", out, mask, inputs[0])


def last_spatial_conv(view: View, branch: int) -> tuple[fx.Node, bool] | None:
    """The end (with norm and activation) of a branch's last convolution over space, and whether it is depthwise."""
    for node in reversed(view.members(branch)):
        if node.op != "call_module":
            continue
        convs = [c.module for c in view.call_of(node).walk() if is_conv(c.module)]
        if not convs:
            continue
        end = node
        while len(end.users) == 1:
            (user,) = end.users
            if not branch >> view.index[user] & 1 or view.is_learned(user) or not is_tensor(user):
                break
            if (user.op != "call_module" and not view.is_nonlinear(user)) or shape(user) != shape(end):
                break
            end = user
        return end, is_depthwise(convs[-1])
    return None
