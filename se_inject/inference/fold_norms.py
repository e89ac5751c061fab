"""Batch norms in eval mode, folded into the convolutions and linear layers before them."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterator

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from ..capture.calls import Call
from ..capture.channels import channel_axis
from ..dataflow.aliasing import storages
from ..dataflow.branches import branches, trace_branches
from ..dataflow.module_graph import ModuleGraph, TracedModel, spelled
from ..dataflow.ops import CONVS, TRANSPOSED_CONVS, argument, is_tensor, layer_arguments, name_of, of, shape
from ..dataflow.value_flow import ValueFlow
from ..errors import Refusal
from .rewritable import check_plain


@dataclasses.dataclass(frozen=True, eq=False)
class Fold:
    """One norm to fold.

    Attributes:
        norm: The norm.
        layer: The layer before it.
        eps: Of the norm.
        linear, transposed: Whether the layer is linear, or a transposed convolution; else it is a convolution.
        rest: Names of the norm's children that its forward calls after it, such as an activation.
    """

    norm: nn.Module
    layer: nn.Module
    eps: float
    linear: bool
    transposed: bool
    rest: tuple[str, ...]


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
    read, runs = set(_read_from_above(traces)), [_Run(root) for root in others]
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
    rest = _children_after(flow, view, node)
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
    if not all(_ends_in_layer(layer, g, value) for g in _graphs(above)):
        raise Refusal("the layer before it does more than a convolution")
    return Fold(norm, layer, argument(node, "eps", 1e-5), linear, transposed, rest)


def _read_from_above(traces: TracedModel) -> Iterator[nn.Module]:
    """The modules whose parameters or buffers the forward of a module around them reads."""
    for module in traces.calls:
        view = traces.view(module)
        for node in view.nodes if view is not None else ():
            path = str(node.target).rpartition(".")[0]
            if node.op == "get_attr" and path:
                yield module.get_submodule(path)


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


def _graphs(view: ModuleGraph) -> list[fx.Graph]:
    """The graphs of all branches of a forward: a convolution may pad its input, or not, by its size."""
    if not view.forward.decisions:
        return [view.forward.graph]
    return [p.graph for p in trace_branches(view.module, view.forward.constants, reading=True) if p.graph is not None]


def _ends_in_layer(layer: nn.Module, graph: fx.Graph, like: fx.Node) -> bool:
    """Whether a forward returns the result of the operator that `like` calls, with the same weights."""
    (node,) = list(graph.nodes)[-1].args
    if not isinstance(node, fx.Node) or name_of(node) != name_of(like):
        return False
    _, weight, bias, _ = layer_arguments(node)
    return _is_own(layer, weight, "weight") and _is_own(layer, bias, "bias")


def _is_own(module: nn.Module, node: object, name: str) -> bool:
    """Whether an argument is the module's own parameter or statistic of that name; or None, where the module has none."""
    own = module._buffers if name.startswith("running_") else module._parameters
    if node is None:
        return own.get(name) is None
    return isinstance(node, fx.Node) and node.op == "get_attr" and node.target == name and own.get(name) is not None


def _children_after(flow: ValueFlow, view: ModuleGraph, node: fx.Node) -> tuple[str, ...]:
    """The chain of children that the norm's forward calls after normalizing, without those that return their input.

    Raises:
        Refusal: The forward does something else.
    """
    names: list[str] = []
    while True:
        (user, *more) = node.users
        if more or user.op not in ("call_module", "output") or list(user.all_input_nodes) != [node]:
            raise Refusal(f"{type(view.module).__name__}.forward does more than normalize and call its children")
        if user.op == "output":
            return tuple(names)
        if not flow.passes(view.call_of(user)):
            names.append(str(user.target))
        node = user


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
        readers = [u for u in x.users if u.op == "output" or (view.carries_data(u) and not _reads_shape(u, x))]
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


@torch.no_grad()
def apply_folds(model: nn.Module, folds: list[Fold]) -> None:
    """Fold norms, in place: a layer gets new weights, and the norm's place gets what the norm called after itself."""
    places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                places.setdefault(child, []).append((parent, name))
    for f in folds:
        weight, bias = f.layer._parameters["weight"], f.layer._parameters.get("bias")
        mean, var = f.norm._buffers["running_mean"], f.norm._buffers["running_var"]
        assert weight is not None and mean is not None and var is not None
        gamma, beta = f.norm._parameters.get("weight"), f.norm._parameters.get("bias")
        w, m, v = weight.double(), mean.double(), var.double()
        g = torch.ones_like(m) if gamma is None else gamma.double()
        s = torch.zeros_like(m) if beta is None else beta.double()
        b = torch.zeros_like(m) if bias is None else bias.double()
        if f.linear:
            new, shift = fuse_linear_bn_weights(w, b, m, v, f.eps, g, s)
        else:
            new, shift = fuse_conv_bn_weights(w, b, m, v, f.eps, g, s, f.transposed)
        f.layer._parameters["weight"] = nn.Parameter(new.to(weight.dtype), requires_grad=False)
        f.layer._parameters["bias"] = nn.Parameter(shift.to(weight.dtype), requires_grad=False)
        rest = [f.norm.get_submodule(name) for name in f.rest]
        new_module = nn.Identity() if not rest else rest[0] if len(rest) == 1 else nn.Sequential(*rest)
        for parent, name in places[f.norm]:
            parent._modules[name] = new_module.eval()
