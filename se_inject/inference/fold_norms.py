"""Which batch norms, in eval mode, can be folded into the convolutions and linear layers before them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from ..capture.calls import Call
from ..capture.channels import channel_axis
from ..capture.graphs import output_of
from ..capture.snapshot import restored
from ..capture.trail import is_trusted, key
from ..dataflow.aliasing import storages
from ..dataflow.branches import branches, trace_branches
from ..dataflow.layers import is_layer
from ..dataflow.module_graph import ModuleGraph, spelled
from ..dataflow.ops import CONVS, TRANSPOSED_CONVS, argument, is_tensor, layer_arguments, name_of, of, shape
from ..dataflow.value_flow import ValueFlow
from ..errors import Refusal
from .forward_class import folded_class
from .inline import inline
from .rewritable import Region, check_plain, check_rewritable


@dataclasses.dataclass(frozen=True, eq=False)
class Fold:
    """One norm to fold.

    Attributes:
        norm: The norm.
        layer: The layer before it.
        eps: Of the norm.
        linear, transposed: Whether the layer is linear, or a transposed convolution; else it is a convolution.
        code: The norm's class without the normalization.
    """

    norm: nn.Module
    layer: nn.Module
    eps: float
    linear: bool
    transposed: bool
    code: type[nn.Module]


@dataclasses.dataclass(frozen=True)
class Norms:
    """What became of a model's batch norms.

    Attributes:
        folded: Paths of the folded ones, each with the path of the layer that it was folded into.
        kept: Paths of the others, each with the reason.
    """

    folded: dict[str, str]
    kept: dict[str, str]


def find_folds(flow: ValueFlow, others: list[Call]) -> tuple[list[Fold], Norms]:
    """The batch norms that can be folded, and a report on all. Use it inside `on_meta`; the model is not changed.

    Args:
        flow: The values of the recorded run.
        others: Recorded runs of other methods of the model, in which the same norms must follow the same layers.
    """
    traces, folds, found = flow.traces, [], Norms({}, {})
    read, runs = set(_read_by_others(traces.root, *others)), [_Run(root) for root in others]
    names = Counter(id(p) for _, p in traces.root.module.named_parameters(remove_duplicate=False))
    for module, calls in traces.calls.items():
        if not {"running_mean", "running_var"} <= module._buffers.keys():
            continue
        try:
            fold = _fold(flow, module)
            if fold.layer in read or module in read:
                raise Refusal("another module reads its weights, or those of the layer before it")
            if any(names[id(p)] > 1 for p in fold.layer._parameters.values()):
                raise Refusal("the layer before it shares its weight")
            if not all(run.pairs(module, fold.layer) for run in runs):
                raise Refusal("another method of the model reads what comes before it")
            folds.append(fold)
            found.folded[calls[0].path] = traces.calls[fold.layer][0].path
        except Refusal as reason:
            found.kept[calls[0].path] = str(reason)
    return folds, found


def _fold(flow: ValueFlow, norm: nn.Module) -> Fold:
    """
    Raises:
        Refusal: The norm stays as it is.
    """
    traces = flow.traces
    if len(traces.calls[norm]) > 1:
        raise Refusal("it is called more than once")
    check_plain(flow, norm, "it")
    view = traces.inside(traces.calls[norm][0])
    if branches(view.module, view.forward):
        raise Refusal("it branches on sizes")
    nodes = [n for n in view.nodes if name_of(n) == "batch_norm"]
    if len(nodes) != 1:
        raise Refusal(f"{type(norm).__name__}.forward is no batch norm")
    (node,) = nodes
    if argument(node, "training", False) or not all(
            _is_own(norm, argument(node, name), name) for name in ("running_mean", "running_var", "weight", "bias")):
        raise Refusal("it normalizes by other statistics or weights than its own")
    _check_children_after(view, node)
    _check_keeps_nothing(flow, view)
    above, value = _layer_before(flow, view, node)
    layer = above.module
    if len(traces.calls[layer]) > 1:
        raise Refusal("the layer before it is called more than once")
    name = name_of(value)
    linear, transposed = name == "linear", name in TRANSPOSED_CONVS
    if not linear and not transposed and name not in CONVS:
        raise Refusal(f"it comes after {spelled(value, above)}")
    if linear and channel_axis(value.meta["val"]) != len(shape(value)) - 1:
        raise Refusal("the linear layer before it has its channels on another axis")
    _, weight, bias, groups = layer_arguments(value)
    if transposed and groups > 1:
        raise Refusal("the layer before it is a transposed convolution with groups")
    if weight is None or not _is_own(layer, weight, "weight") or not _is_own(layer, bias, "bias"):
        raise Refusal(f"{traces.calls[layer][0].path or 'the layer before it'} computes its weight")
    if not (is_trusted(layer) and "bias" not in layer.__dict__):  # torch's own layers take whatever bias they have
        _check_takes_bias(above, value)
    graph = _without_norm(flow, view, node)
    return Fold(norm, layer, argument(node, "eps", 1e-5), linear, transposed, folded_class(norm, graph))


def _read_by_others(*runs: Call) -> Iterator[nn.Module]:
    """The modules whose parameters or buffers an operator took in that ran in the forward of another module."""
    owners: dict[int, nn.Module] = {}
    for m in runs[0].module.modules():
        for t in (*m._parameters.values(), *m._buffers.values()):
            if t is not None:
                owners |= {key(t): m, -id(t): m}  # it may have got a number during the run
    for call in (call for root in runs for call in root.walk()):
        for k in (k for _, sources, _ in call.own_trail for k in sources):
            if k in owners and owners[k] is not call.module:
                yield owners[k]


class _Run:
    """Another recorded run of the model.

    Attributes:
        returned: The storages of what it returned.
        calls: The calls of each module.
        readers: For each storage, the calls that take it in.
    """

    def __init__(self, root: Call) -> None:
        self.returned = storages(root.output)
        self.calls: dict[nn.Module, list[Call]] = defaultdict(list)
        self.readers: dict[int, list[Call]] = defaultdict(list)
        for call in root.walk():
            self.calls[call.module].append(call)
            for value in () if call.passes else storages((call.args, call.kwargs)):
                self.readers[value].append(call)

    def pairs(self, norm: nn.Module, layer: nn.Module) -> bool:
        """Whether the norm follows the layer, and nothing else reads the layer's output."""
        norms, layers = self.calls[norm], self.calls[layer]
        around: set[Call] = set()
        for call in norms:
            at: Call | None = call
            while at is not None:
                around.add(at)
                at = at.parent
        return len(norms) == len(layers) and all(
            storages(n.args) == storages(c.output) and not self.returned & storages(c.output)
            and all(around.issuperset(self.readers[value]) for value in storages(c.output)) for n, c in zip(norms, layers))


def _check_takes_bias(view: ModuleGraph, like: fx.Node) -> None:
    """
    Args:
        view: The forward of a layer.
        like: Its operator.

    Raises:
        Refusal: The layer, given a bias, would not return the result of that operator with its weight and that bias, on each
            branch: a convolution may pad its input, or not, by its size.
    """
    layer = view.module
    with restored([layer]):
        if layer._parameters.get("bias") is None:
            layer._parameters["bias"] = nn.Parameter(torch.empty(0, device="meta"), requires_grad=False)
        for branch in trace_branches(layer, view.forward.constants):
            if branch.refused:
                continue
            if branch.graph is None:
                raise Refusal(branch.error)
            result: Any = output_of(branch.graph).args[0]
            if name_of(result) != name_of(like) or not all(
                    isinstance(p, fx.Node) and _is_own(layer, p, name)
                    for p, name in zip(layer_arguments(result)[1:], ("weight", "bias"))):
                raise Refusal("the layer before it does more than a convolution, or takes no bias")


def _is_own(module: nn.Module, node: object, name: str) -> bool:
    """Whether an argument is the module's own parameter or statistic of that name; or None, where the module has none."""
    own = module._buffers if name.startswith("running_") else module._parameters
    if node is None:
        return own.get(name) is None
    return isinstance(node, fx.Node) and node.op == "get_attr" and node.target == name and own.get(name) is not None


def _check_children_after(view: ModuleGraph, node: fx.Node) -> None:
    """
    Raises:
        Refusal: The norm's forward does more than normalize its input, call its children in a chain, and return the result.
    """
    more = Refusal(f"{type(view.module).__name__}.forward does more than normalize and call its children")
    if sum(n.op == "placeholder" for n in view.nodes) != 1:
        raise more
    while node.op != "output":
        if len(node.users) != 1:
            raise more
        (user,) = node.users
        if user.op not in ("call_module", "output") or user.args != (node,) or user.kwargs:
            raise more
        node = user


def _without_norm(flow: ValueFlow, view: ModuleGraph, node: fx.Node) -> fx.Graph:
    """A norm's forward with its input in place of the normalized one; the children that it calls are inlined where they can be,
    as calling a module takes as long as a small activation."""
    inlined: set[Call] = set()
    for n in view.nodes:
        if n.op == "call_module":
            with contextlib.suppress(Refusal):
                check_rewritable(flow, view.call_of(n), inlined=True)
                inlined.add(view.call_of(n))
    found = inline(flow, Region(view.call, frozenset(inlined)), set())
    norm = found.at(view.call, node)
    norm.replace_all_uses_with(argument(norm, "input"))
    found.graph.erase_node(norm)
    for n in found.graph.nodes:
        if n.op == "get_attr" and not n.users:  # what the norm read; other operators may write in place
            found.graph.erase_node(n)
    return found.graph


def _check_keeps_nothing(flow: ValueFlow, view: ModuleGraph) -> None:
    """
    Raises:
        Refusal: A forward that computes, passes on or normalizes a map may keep it, such as in an attribute.
    """
    module = view.module
    if is_trusted(module):
        return
    cls: Any = type(module)
    if is_layer(cls):
        why = view.shared("why it may keep a map", lambda: _why_not_traced(view))
    else:
        why = flow.traces.failures.get(module) if flow.traces.view(module) is None else None
    if why is not None:
        raise Refusal(why)


def _why_not_traced(view: ModuleGraph) -> str | None:
    """Why a layer's forward has no trace but to be read; None where it has one."""
    try:
        trace_branches(view.module, view.forward.constants)
    except Refusal as reason:
        return str(reason)
    return None


def _layer_before(flow: ValueFlow, view: ModuleGraph, node: fx.Node) -> tuple[ModuleGraph, fx.Node]:
    """The operator that computes a norm's input, and its forward.

    Raises:
        Refusal: Something else reads that input, or hooks may.
    """
    x = argument(node, "input")
    channels = shape(x)[1]
    if channel_axis(x.meta["val"]) != 1:
        raise Refusal("it normalizes another axis than the channels")
    crossed: list[ModuleGraph] = []
    while True:
        readers = [u for u in view.readers(x) if not _reads_shape(u, x)]
        if len(readers) != 1:
            raise Refusal("what comes before it is also read elsewhere")
        if x.op == "placeholder":
            above = flow.caller(view)
            if above is None:
                raise Refusal("it normalizes the model's input")
            given = flow.bound(view.module, above[1]).get(str(x.target))
            check_plain(flow, view.module, view.path)
            view = above[0]
            crossed.append(view)
        elif x.op == "call_module":
            call = view.call_of(x)
            if flow.passes(call):
                given = x.args[0]
            else:
                check_plain(flow, call.module, call.path)
                view = flow.traces.inside(call)
                given = view.nodes[-1].args[0]
                crossed.append(view)
        elif (of(x).views or of(x).casts) and _keeps_channels(x, channels):
            given = x.args[0]
        else:
            for other in crossed:
                _check_keeps_nothing(flow, other)
                name = type(other.module).__name__
                if other is not view and branches(other.module, other.forward):  # `_fold` looks at all branches of the layer
                    raise Refusal(f"{name}.forward branches on sizes")
                check_plain(flow, other.module, name, may_have_hooks=True)
            return view, x
        if not isinstance(given, fx.Node):
            raise Refusal("what comes before it is one of several outputs")
        x = given


def _reads_shape(user: fx.Node, node: fx.Node) -> bool:
    """Whether an operator takes nothing but the shape of `node`."""
    return user.target in ("reshape_as", "view_as", "expand_as") and user.args[0] is not node


def _keeps_channels(node: fx.Node, channels: int) -> bool:
    """Whether an operator that moves elements leaves each in its channel."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or not is_tensor(source) or not is_tensor(node):
        return False
    tensors = [node.meta["val"], source.meta["val"]]
    axes = [channel_axis(t) for t in tensors]
    return tensors[0].numel() == tensors[1].numel() and all(
        a is not None and t.shape[a] == channels for t, a in zip(tensors, axes))
