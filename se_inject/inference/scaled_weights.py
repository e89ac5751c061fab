"""Scale the weights of the layer that reads a gated map, instead of the map: for one image the weights are often smaller."""

from __future__ import annotations

import torch
from torch import fx

from ..capture.calls import Call
from ..dataflow.module_graph import ModuleGraph, spelled
from ..dataflow.ops import CONVS, is_tensor, layer_arguments, name_of, shape
from ..dataflow.value_flow import ValueFlow
from ..errors import Refusal
from .programs import is_program
from .rewritable import check_rewritable, forward_of


def scaled(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, in_place: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The input and the weight of a layer on `x` times `gate`: the gate goes into the smaller of the two.

    A gate goes into the weight only where it is the same for all images, so for one image. Scaling the weight costs a read and
    a write of it: this pays where it has at most half as many elements as the map. Programs scale the map: compilers do that
    together with the operator before it, and arrange a constant weight once.

    Args:
        x: The map, with its channels along axis 1 (convolutions) or the last one (linear layers).
        gate: One value for each channel, or for each image and channel.
        weight: (out, in, ...).
        in_place: Whether the memory of `x` may be written.
    """
    if torch.jit.is_scripting():  # TorchScript does not compile the other branch
        return (x.mul_(gate) if in_place else x * gate), weight
    else:
        if not is_program(x) and gate.numel() == weight.shape[1] and 2 * weight.numel() <= x.numel():
            return x, weight * gate.view(-1, *(1,) * (weight.dim() - 2))
        return (x.mul_(gate) if in_place else x * gate), weight


def takes_gate(layer: fx.Node, product: fx.Node, gate: fx.Node) -> bool:
    """Whether `scaled` can compute the input and the weight of `layer`, which alone reads `product`, a map times `gate`."""
    if not _is_layer_on(layer, product):
        return False
    rank = len(shape(product))
    axis = rank - 1 if name_of(layer) == "linear" else 1
    sizes = (1,) * (rank - len(shape(gate))) + shape(gate)
    return sizes[axis] == shape(product)[axis] and all(n == 1 for d, n in enumerate(sizes) if d not in (0, axis))


def calls_to_layer(flow: ValueFlow, view: ModuleGraph, node: fx.Node) -> list[Call]:
    """The calls to inline, so that the forward of a value has the layer that alone reads it.

    Raises:
        Refusal: There is no such layer, or it cannot be inlined.
    """
    found: list[Call] = []
    while True:
        if len(node.users) != 1:
            raise Refusal("several operators read it")
        user = next(iter(node.users))
        if user.op != "call_module":
            if not _is_layer_on(user, node):
                raise Refusal(f"{spelled(user, view)} reads it")
            return found
        call = view.call_of(user)
        if flow.passes(call):
            node = user
            continue
        check_rewritable(flow, call, inlined=True)
        found.append(call)
        given = [name for name, value in flow.bound(call.module, user).items() if value is node]
        called = forward_of(flow, call)
        assert called is not None
        view = called
        inside = [n for n in view.nodes if n.op == "placeholder" and str(n.target) in given]
        if len(inside) != 1:
            raise Refusal(f"{call.path} takes it in another way than as one argument")
        node = inside[0]


def _is_layer_on(node: fx.Node, x: fx.Node) -> bool:
    """Whether a node is a linear layer, or a convolution without groups, of `x` with a weight of the model."""
    if node.op != "call_function" or not (name_of(node) in CONVS or name_of(node) == "linear"):
        return False
    given, weight, _, groups = layer_arguments(node)
    if given is not x or not is_tensor(x) or groups != 1:
        return False
    return isinstance(weight, fx.Node) and weight.op == "get_attr" and (
        name_of(node) == "linear" or len(shape(weight)) == len(shape(x)))
