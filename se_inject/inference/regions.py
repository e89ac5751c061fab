"""The forwards to rewrite: those with blocks or sums, each with gates for its blocks and sums in place."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterable

import torch
from torch import fx, nn

from ..capture.arguments import optional_tensors
from ..capture.calls import Call
from ..capture.graphs import subgraph
from ..capture.meta_ops import storage
from ..dataflow.module_graph import ModuleGraph
from ..dataflow.ops import is_tensor, name_of, products, shape
from ..dataflow.value_flow import ValueFlow
from ..errors import Refusal
from ..find.attention import Gate
from .find_blocks import Block
from .forward_class import become, optimized_class
from .in_place import write_in_place
from .inline import InlinedGraph, inline
from .merged_layers import MergedGate
from .rewritable import Region, check_rewritable, forward_of


def find_sums(flow: ValueFlow, blocks: Collection[Call]) -> tuple[list[Region], dict[str, str]]:
    """The regions with sums of two activations, and the paths of the modules whose sums stay as they are, with the reason.

    A call that scales an operand of a sum is inlined, so that one operator does both. `blocks` are the calls of blocks, which
    become products.
    """
    regions, kept = [], {}
    for module in flow.traces.calls:
        view = flow.traces.view(module)
        operands = [] if view is None else [a for n in view.nodes for a in _summed(view, n)]
        if view is None or not operands:
            continue
        try:
            check_rewritable(flow, view.call, inlined=False)
        except Refusal as reason:
            kept[view.path] = str(reason)
            continue
        inlined: set[Call] = set()
        for a in operands:
            with contextlib.suppress(Refusal):
                inlined.update(_calls_to_product(flow, view, a, blocks))
        regions.append(Region(view.call, frozenset(inlined)))
    return regions, kept


def _summed(view: ModuleGraph, node: fx.Node) -> list[fx.Node]:
    """The operands of a sum of two activations of one shape; none for other nodes."""
    if name_of(node) != "add" or len(node.args) != 2:
        return []
    found = [a for a in node.args if isinstance(a, fx.Node) and is_tensor(a) and view.moves(a) and shape(a) == shape(node)]
    return found if len(found) == 2 else []


def _calls_to_product(flow: ValueFlow, view: ModuleGraph, node: fx.Node, blocks: Collection[Call]) -> list[Call]:
    """The calls to inline, so that a value is a product in this forward.

    Raises:
        Refusal: It is no product, or something else reads it.
    """
    if len(node.users) != 1:
        raise Refusal("it is read elsewhere")
    if node.op != "call_module":
        if any(not is_tensor(k) or k.meta["val"].numel() < x.meta["val"].numel() for x, k in products(node)):
            return []
        raise Refusal("it is no product of a tensor with a smaller one")
    call = view.call_of(node)
    if flow.passes(call) and isinstance(node.args[0], fx.Node):
        return _calls_to_product(flow, view, node.args[0], blocks)
    if call in blocks:
        return []
    check_rewritable(flow, call, inlined=True)
    inside = forward_of(flow, call)
    assert inside is not None
    result = inside.nodes[-1].args[0]
    if not isinstance(result, fx.Node):
        raise Refusal("it comes out of its module together with others")
    return [call, *_calls_to_product(flow, inside, result, blocks)]


def merged(regions: Iterable[Region]) -> list[Region]:
    """Merge regions that share a call, so that the result is disjoint."""
    found: dict[Call, Region] = {}
    for region in regions:
        calls = region.calls.union(*(found[c].calls for c in region.calls if c in found))
        root = min(calls, key=lambda c: c.begin)
        found.update(dict.fromkeys(calls, Region(root, calls - {root})))
    return list(dict.fromkeys(found.values()))


@dataclasses.dataclass(frozen=True, eq=False)
class Rewrite:
    """What to do to one module. `apply` it outside `on_meta`, which would undo it.

    Attributes:
        module: The module.
        code: Its new class; for a `torch.fx.GraphModule` its new graph.
        gates: For each block that the new forward replaces: the block, and the name and the module of its gate.
        sums: The number of sums in place, or in one pass with a scaling.
    """

    module: nn.Module
    code: type[nn.Module] | fx.Graph
    gates: list[tuple[nn.Module, str, MergedGate | Gate]]
    sums: int

    def apply(self) -> None:
        """Change the module. A gate becomes a child of its block, which stays for methods that call it."""
        for block, name, gate in self.gates:
            made = gate.function() if isinstance(gate, Gate) else gate
            block._modules[name] = made.eval().requires_grad_(False)
        if isinstance(self.code, fx.Graph):
            assert isinstance(self.module, fx.GraphModule)
            self.module.graph = self.code
            self.module.recompile()
        else:
            become(self.module, self.code)


def find_rewrites(flow: ValueFlow, regions: Iterable[Region], blocks: list[Block]) -> list[Rewrite]:
    """What to do to the root of each region; nothing where there is no block, and neither a sum nor a product to rewrite.

    Use it inside `on_meta`; the model is not changed.

    Args:
        flow: The values of the recorded run.
        regions: Regions without common calls, which include those of the blocks.
        blocks: In the order of their calls.
    """
    model = flow.traces.root.module
    weights = {storage(t) for t in (*model.parameters(), *model.buffers())}
    found = []
    for region in regions:
        inlined = inline(flow, region, weights)
        gates = [(b.call.module, _insert_gate(inlined, b), b.gate) for b in blocks if b.view.call in region.calls]
        sums, scalings = write_in_place(inlined.graph, may_write=not isinstance(region.root.module, fx.GraphModule))
        if gates or sums or scalings:
            found.append(Rewrite(region.root.module, _code(flow, region.root, inlined.graph), gates, sums))
    return found


def _code(flow: ValueFlow, call: Call, graph: fx.Graph) -> type[nn.Module] | fx.Graph:
    """The class, or for a GraphModule the graph, that makes `graph` the forward of the called module."""
    if isinstance(call.module, fx.GraphModule):
        return graph
    view = flow.traces.view(call.module)
    assert view is not None
    constants = view.forward.constants
    given = optional_tensors(type(call.module), constants, [view.forward.graph])
    return optimized_class(call.module, graph, subgraph(view.forward.graph), constants, given)


def _insert_gate(inlined: InlinedGraph, block: Block) -> str:
    """Replace the call of a block by a product with its gate, computed from the block's source.

    Returns:
        The name of the child of the block that has the gate's weights: one that is not in use.
    """
    name = "optimized"
    while hasattr(block.call.module, name):
        name += "_"
    graph = inlined.graph
    node, source = inlined.at(block.view.call, block.node), inlined.at(block.source.view.call, block.source.node)
    x = node.args[0]
    assert isinstance(x, fx.Node)
    path, number = f"{node.target}.{name}", 1.0
    with graph.inserting_before(_place_after(source) if block.source.steps else node):
        if isinstance(block.gate, MergedGate):
            gate, number = block.gate.insert(graph, path, source)
        else:
            gate = graph.call_module(path, (source,))
    value = node.meta["val"]
    gate.meta = {"val": value.new_empty([n if d in (0, block.axis) else 1 for d, n in enumerate(value.shape)])}
    with graph.inserting_before(node):
        product = graph.call_function(torch.mul, (x, gate))
        product.meta = {"val": value}
        if number != 1.0:
            product = graph.call_function(torch.mul, (product, number))
            product.meta = {"val": value}
    inlined.replace(node, product)
    return name


def _place_after(node: fx.Node) -> fx.Node:
    """The node to insert before, so that it comes after `node`; placeholders stay first."""
    after = node.next
    while after.op == "placeholder":
        after = after.next
    return after
