"""The gate of a block as a few layers on vectors, from the mean of the block's input."""

from __future__ import annotations

import copy

from torch import fx

from ..capture.meta_ops import storage
from ..dataflow.module_graph import ModuleGraph, spelled
from ..dataflow.ops import CONVS, argument, is_tensor, name_of, of, products, shape
from ..dataflow.value_flow import ValueFlow
from ..errors import Refusal
from ..find.attention import Gate
from .affine import Affine, Maps, is_pointwise
from .merged_layers import Layer

_IN_PLACE = ("relu", "sigmoid")  # the functions that are recognized; each has a method that works in place


class GateBuilder:
    """Reads the layers of gates off the traced forwards. Use it inside `on_meta`."""

    def __init__(self, flow: ValueFlow, maps: Maps) -> None:
        self.flow = flow
        self.maps = maps

    def layers_of(self, gate: Gate, start: fx.Node) -> list[Layer]:
        """The layers from the mean of `start`, the block's input, to its gate; linear layers in a row are merged.

        Raises:
            Refusal: The gate is not a chain of linear layers and activations on that mean.
        """
        found: list[Layer] = []  # the last first
        view, node = gate.view, gate.node
        chain: list[tuple[ModuleGraph, fx.Node]] = []
        while True:
            view, node = self._unmoved(view, node, chain)
            if node.op == "placeholder":
                raise Refusal("its gate is not made from the mean of its input alone")
            if of(node).reduces == "mean" or name_of(node).startswith("adaptive_avg_pool"):
                self._check_mean(view, node, start, gate.axis)
                _check_unchanged(chain)
                return found[::-1]
            layer, view, node = self._layer(view, node, is_last=not found)
            if found and isinstance(layer, Affine) and isinstance(found[-1], Affine):
                found[-1] = found[-1].after(layer)
            else:
                found.append(layer)

    def _layer(self, view: ModuleGraph, node: fx.Node, is_last: bool) -> tuple[Layer, ModuleGraph, fx.Node]:
        """The layer that computes a vector, and the layer's input.

        Raises:
            Refusal: The operator is neither a linear layer nor an activation.
        """
        x = argument(node, "input")
        if _is_vector_layer(view, node):
            return self.maps.layer(view, node), view, x
        if is_last:  # the number goes to the product with the gate
            for y, k in products(node):
                if isinstance(k, (int, float)):
                    return float(k), view, y
        if name_of(node) in _IN_PLACE and list(node.all_input_nodes) == [x]:
            return f"{name_of(node)}_", view, x
        inputs = [n for n in view.nodes if n.op == "placeholder" and is_tensor(n)]
        if len(inputs) == 1 and view.nodes[-1].args[0] is node and _is_elementwise(view):
            outside = self.flow.outward(view, inputs[0])
            if outside[0] is not view:
                return copy.deepcopy(view.module), *outside
        raise Refusal(f"{spelled(node, view)} is neither a linear layer, nor relu, sigmoid or an activation module")

    def _unmoved(
        self, view: ModuleGraph, node: fx.Node, chain: list[tuple[ModuleGraph, fx.Node]]
    ) -> tuple[ModuleGraph, fx.Node]:  # fmt: skip
        """The operator that computes a vector (N, C), through changes of its shape; `chain` gets what is passed."""
        while True:
            chain += [(view, node), self.flow.outward(view, node)]
            view, node = self.flow.origin(view, node)
            chain.append((view, node))
            source = node.args[0] if node.args else None
            if not (of(node).views or of(node).casts) or not isinstance(source, fx.Node) or not is_tensor(source) or (
                    _vector(source) is None or _vector(node) != _vector(source)) or (
                    source.meta["val"].dtype != node.meta["val"].dtype):
                return view, node
            node = source

    def _check_mean(self, view: ModuleGraph, node: fx.Node, start: fx.Node, axis: int) -> None:
        """
        Raises:
            Refusal: `node` is not the mean of `start` over all axes but the batch and `axis`.
        """
        x = argument(node, "input")
        above, source = self.flow.outward(view, x)
        if source is not start:
            raise Refusal(f"its squeeze reads {spelled(source, above)}, and not its input alone")
        dims = argument(node, "output_size" if of(node).pools else "dim")
        if of(node).pools:
            whole = dims in (1, (1, 1), [1, 1]) and axis == 1
        else:
            rank = len(shape(x))
            whole = {d % rank for d in ([dims] if isinstance(dims, int) else dims or ())} == set(range(1, rank)) - {axis}
        if not whole:
            raise Refusal("its squeeze is not the mean over all positions")


def _check_unchanged(chain: list[tuple[ModuleGraph, fx.Node]]) -> None:
    """
    Raises:
        Refusal: A statement beside the chain changes one of its values in place.
    """
    here, calls = {node for _, node in chain}, [view.call for view, _ in chain]
    for view in {id(view): view for view, _ in chain}.values():
        memory = {storage(n.meta["val"]) for v, n in chain if v is view}
        for node in view.nodes:
            if node in here or not memory & node.meta.get("writes", frozenset()):
                continue
            if node.op != "call_module" or not any(
                    view.call_of(node).begin <= c.begin < view.call_of(node).end for c in calls):
                raise Refusal(f"{spelled(node, view)} changes a value of its gate in place")


def _is_vector_layer(view: ModuleGraph, node: fx.Node) -> bool:
    """Whether a node is a linear layer, or a convolution that is one, on the channels of a vector."""
    x, is_linear = argument(node, "input"), name_of(node) == "linear"
    if not (is_linear or name_of(node) in CONVS) or not is_tensor(x) or not is_pointwise(view, node):
        return False
    axis = -1 if is_linear else 1
    return all(_vector(n) == (shape(n)[0], shape(n)[axis]) for n in (x, node))


def _vector(node: fx.Node) -> tuple[int, int] | None:
    """(N, C) of a value with one position, in any layout; None for other values."""
    sizes = shape(node)
    wide = [n for n in sizes[1:] if n != 1]
    return (sizes[0], wide[0] if wide else 1) if len(sizes) > 1 and len(wide) < 2 else None


def _is_elementwise(view: ModuleGraph) -> bool:
    """Whether a forward computes each element from the same element of its input, without parameters."""
    return not any(True for _ in view.module.parameters()) and all(  # a size would be that of another shape
        n.op in ("placeholder", "output") or (is_tensor(n) and of(n).elementwise) for n in view.nodes)
