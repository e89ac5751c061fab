"""A copy of a model that computes the same, and nothing twice: norms folded, squeezes upstream, sums in place."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Iterable, Mapping

import torch
from torch import fx, nn

from ..capture.graphs import subgraph
from ..capture.inputs import record_model
from ..capture.meta_ops import storage
from ..capture.recording import Call
from ..capture.snapshot import HOOKS, restored, surgery_lock
from ..dataflow.branches import branches
from ..dataflow.module_graph import ModuleGraph
from ..dataflow.ops import is_tensor, name_of, shape
from ..dataflow.value_flow import ValueFlow
from ..errors import Refusal, SEInjectError, TraceError
from ..find.attention import Gate, Gates, gate_of
from ..surgery.codegen import regenerate
from ..surgery.load_hooks import remove_hooks
from ..surgery.refusals import refuse
from ..surgery.session import traced
from ..surgery.state import REPORT, block_paths, edited_owners, set_injections
from .fold_norms import Norms, apply_folds, find_folds
from .forward_class import become, optimized_class
from .gate_layers import GateBuilder
from .in_place import write_in_place
from .inline import InlinedGraph, cannot_inline, inline
from .merged_layers import Affine, Layer, MergedGate
from .report import OptimizedBlock, OptimizedModel
from .upstream import Source

_logger = logging.getLogger("se_inject")


@torch.no_grad()
def optimize_for_inference(model: nn.Module, *, input_size: tuple[int, ...] | None = None) -> nn.Module:
    """A copy of `model` for inference, which computes the same up to rounding, in less time. The model is not changed.

    - Batch norms are folded into the convolutions and linear layers before them.
    - A squeeze-and-excitation block becomes its gate: the mean is taken of the cheapest tensor upstream that tells it
      (through 1x1 convolutions of stride 1, folded norms, linear layers), and the block's first layer is merged with what lies
      between. Its layers work on vectors.
    - Scale, layer scale and residual sum are one pass, in the memory of a value that is not read any more.

    It serves injected models, timm's own with SE, and models without SE. Classes, module names and methods such as
    ``forward_features`` stay; weights do not keep all their names and shapes. The copy is in eval mode, and its parameters
    need no gradient. What was done to each block and norm, or why not, is in its attribute ``se_report``: print it.

    Args:
        model: A model with weights, injected or not.
        input_size: (C, H, W) to run the model on, without computing; None is the model's own. The copy takes all sizes that
            the model does.

    Returns:
        The copy; ``copy.se_report`` is an `OptimisedModel`.

    Raises:
        SEInjectError: The model cannot be run or is wrapped; the message gives the call that works.

    Example:
        >>> fast = se_inject.optimize_for_inference(model)  # doctest: +SKIP
        >>> print(fast.se_report)  # doctest: +SKIP
    """
    refuse(model, "optimize_for_inference", values=True)
    for owner in edited_owners(model):
        regenerate(owner)
    blocks = set(block_paths(model))
    fast = _copied(model).eval().requires_grad_(False)
    remove_hooks(fast)
    set_injections(fast, ())
    hooked = {m for m in fast.modules() if any(m.__dict__[kind] for kind in HOOKS)}
    with traced(fast, input_size) as t:
        others = [call for call in (_run_of(fast, method, input_size) for method in _METHODS) if call is not None]
        folds, norms = find_folds(ValueFlow(t, hooked), others)
    apply_folds(fast, folds)
    values = {**dict(fast.named_parameters(remove_duplicate=False)), **dict(fast.named_buffers(remove_duplicate=False))}
    with traced(fast, input_size) as t:
        changes = _Planner(fast, ValueFlow(t, hooked), values).plan(blocks)
    report = changes.apply(norms)
    fast.__dict__[REPORT] = report
    if isinstance(fast, fx.GraphModule):  # whose copies have what is named there
        fast.meta.setdefault("_user_preserved_attributes", {})[REPORT] = report
    _logger.info("%s", report.summary())
    return fast


_METHODS = ("forward_features", "forward_intermediates")  # timm's, which call the same modules in their own ways


def _run_of(model: nn.Module, method: str, input_size: tuple[int, ...] | None) -> Call | None:
    """The recorded run of another method of a model; None where it has none, or where that fails. Use it inside `abstract`."""
    if not hasattr(model, method):
        return None
    with restored([model]):
        model.__dict__["forward"] = getattr(model, method)
        try:
            return record_model(model, input_size).root
        except TraceError:
            return None


def _copied(model: nn.Module) -> nn.Module:
    """
    Raises:
        SEInjectError: Python cannot copy the model.
    """
    try:
        with surgery_lock:  # else another thread's injection may have its tensors on the meta device
            return copy.deepcopy(model)
    except Exception as error:
        raise SEInjectError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}): take off what it holds besides "
            "modules and parameters, as torch.nn.utils.prune.remove and remove_weight_norm do") from error


@dataclasses.dataclass(eq=False)
class _Block:
    """A block, where it is called, what it becomes, and the calls whose forwards come into one graph for that."""

    call: Call
    view: ModuleGraph
    node: fx.Node
    axis: int
    source: Source
    root: Call
    inside: set[Call]
    gate: MergedGate | Gate
    report: OptimizedBlock


@dataclasses.dataclass(eq=False)
class _Region:
    """A forward to write anew, and the calls in it whose forwards are put in."""

    root: Call
    inside: set[Call]
    blocks: list[_Block] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(eq=False)
class _Changes:
    """All that is to be done, outside of `abstract`."""

    model: nn.Module
    reports: list[OptimizedBlock]
    gates: list[tuple[nn.Module, str, MergedGate | Gate]]
    classes: list[tuple[nn.Module, type[nn.Module] | fx.Graph]]
    sums: int = 0
    kept: dict[str, str] = dataclasses.field(default_factory=dict)

    def apply(self, norms: Norms) -> OptimizedModel:
        """Put gates and classes into the model. A gate is a child of its block, which stays for who calls it in other ways."""
        for block, name, gate in self.gates:
            module = gate.function() if isinstance(gate, Gate) else gate
            block._modules[name] = module.eval().requires_grad_(False)
        for module, code in self.classes:
            if isinstance(code, fx.Graph):
                assert isinstance(module, fx.GraphModule)
                module.graph = code
                module.recompile()
            else:
                become(module, code)
        return OptimizedModel(tuple(self.reports), norms.folded, norms.kept, self.sums, self.kept)


class _Planner:
    def __init__(self, model: nn.Module, flow: ValueFlow, values: Mapping[str, torch.Tensor]) -> None:
        self.model = model
        self.traces = flow.traces
        self.flow = flow
        self.lowering = GateBuilder(self.flow, values)
        self.values = values
        self.persistent = {storage(t) for t in (*model.parameters(), *model.buffers())}
        self.reports: list[OptimizedBlock] = []
        self.lowered: dict[Call, _Block] = {}
        self.kept: dict[str, str] = {}

    def plan(self, injected: set[str]) -> _Changes:
        """What to do; the model is not changed. `injected` are the paths of the injected blocks."""
        pure = {m for m, is_pure in Gates(self.traces).pure.items() if is_pure}
        for call in self.traces.root.walk():
            outer = call.parent
            while outer is not None and outer not in self.lowered:
                outer = outer.parent
            if outer is None and (call.module in pure or call.path in injected):
                try:
                    block = self._block(call)
                    self.lowered[call] = block
                    self.reports.append(block.report)
                except Refusal as reason:
                    self.reports.append(OptimizedBlock(call.path, None, None, str(reason)))
        regions = self._merged([*(
            _Region(b.root, b.inside, [b]) for b in self.lowered.values()), *self._sums()])
        changes = _Changes(self.model, self.reports, [], [])
        for region in regions:
            self._rewrite(region, changes)
        changes.kept = self.kept
        return changes

    # blocks

    def _block(self, call: Call) -> _Block:
        """
        Raises:
            Refusal: The block stays as it is.
        """
        if len(self.traces.calls[call.module]) > 1:
            raise Refusal("it is called more than once")
        if any(c.module in (self.flow.barriers or ()) or "forward" in c.module.__dict__ for c in call.walk()):
            raise Refusal("it has hooks, or a forward that is not its class's")
        if call.writes:
            raise Refusal("it writes into its input")
        if branches(self.traces.inside(call)):
            raise Refusal("it branches on sizes")
        if isinstance(call.module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            raise Refusal("it is a container")
        above = self.flow.caller(self.traces.inside(call))
        if above is None:
            raise Refusal("it is the model itself")
        view, node = above
        if len(node.all_input_nodes) != 1 or node.kwargs or len(node.args) != 1:
            raise Refusal("it takes in more than one tensor")
        x = node.all_input_nodes[0]
        start = self.flow.outward(view, x)[1]
        gate = gate_of(self.flow, call)
        if gate.moved:
            raise Refusal("it works in another layout than its input's")
        axis = gate.axis
        why = cannot_inline(self.flow, view.call, False)
        if why is not None:
            raise Refusal(f"its owner is left alone: {why}")
        dims = shape(node)
        out = tuple(n if d == axis else 1 for d, n in enumerate(dims))[1:]
        try:
            layers = self.lowering.layers_of(gate.view, gate.node, start, axis)
        except Refusal as reason:
            if gate.view.call is not call or self.traces.view(call.module) is None:
                raise
            source = Source(view, x, axis)
            report = OptimizedBlock(call.path, self._named(source), None, str(reason))
            return _Block(call, view, node, axis, source, view.call, set(), gate, report)
        source, root, inside, layers, why = self._source(view, x, axis, layers)
        key = next(iter(dict(call.module.named_parameters())), None)
        like = self.values[f"{call.path}.{key}" if key else next(iter(dict(self.model.named_parameters())))]
        made = [self._made(layer) for layer in layers]
        positions = tuple(d for d in range(1, len(shape(source.node))) if d != source.axis)
        report = OptimizedBlock(
            call.path, self._named(source), source.channels if source.steps else None, why)
        return _Block(call, view, node, axis, source, root, inside, MergedGate(positions, made, out, like), report)

    def _source(
        self, view: ModuleGraph, x: fx.Node, axis: int, layers: list[Layer]
    ) -> tuple[Source, Call, set[Call], list[Layer], str | None]:
        """The cheapest tensor to take the mean of, the forwards to put together for it, the layers from there, and why it is
        the block's own input, or None."""
        first = layers[0] if layers and isinstance(layers[0], Affine) else None
        candidates, why = self.lowering.sources(view, x, axis)
        if first is None:
            candidates, why = candidates[:1], "its first layer is no linear layer over channels"

        def cost(s: Source) -> int:
            return s.elements + (s.channels * first.bias.numel() if first is not None else 0)

        own = Source(view, x, axis)
        here = (own, view.call, set[Call](), layers, why)
        best = min(candidates, key=cost)
        if not best.steps or cost(best) >= cost(own):
            cheaper = f"no tensor before it is cheaper; {why}" if len(candidates) > 1 else why
            return (*here[:4], cheaper)
        try:
            root, inside = self._together(view.call, best.view.call)
        except Refusal as reason:
            return (*here[:4], str(reason))
        assert first is not None  # there is one candidate without
        merged = first
        for step in best.steps:
            merged = merged.behind(step())
        return best, root, inside, [merged, *layers[1:]], None

    def _together(self, a: Call, b: Call) -> tuple[Call, set[Call]]:
        """The innermost call that both are inside of, and the calls on the way from it to both.

        Raises:
            Refusal: One of the forwards cannot be put together with others.
        """
        ways = []
        for call in (a, b):
            way = [call]
            while way[-1].parent is not None:
                way.append(way[-1].parent)
            ways.append(way)
        root = next(c for c in ways[0] if c in set(ways[1]))
        inside = {c for way in ways for c in way[:way.index(root)]}
        for call in (root, *inside):
            reason = cannot_inline(self.flow, call, call is not root)
            if reason is not None:
                raise Refusal(f"the cheaper tensor is in another forward: {reason}")
        return root, inside

    @staticmethod
    def _made(layer: Layer) -> Layer:
        if isinstance(layer, nn.Module):
            layer = copy.deepcopy(layer)
            if getattr(layer, "inplace", None) is False:
                layer.__dict__["inplace"] = True  # a linear layer's output is its alone
        return layer

    def _named(self, source: Source) -> str:
        node, view = source.node, source.view
        while node.op == "call_module" and self.flow.passes(view.call_of(node)) and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        if node.op == "call_module":
            return f"{view.path}.{node.target}" if view.path else str(node.target)
        return f"{node.name} in {view.path or type(view.module).__name__}"

    # sums

    def _sums(self) -> Iterable[_Region]:
        """The forwards with sums of two activations, and the calls that scale an operand."""
        for module in self.traces.calls:
            view = self.traces.view(module)
            if view is None:
                continue
            sums = [n for n in view.nodes if name_of(n) == "add" and len(
                n.args) == 2 and all(is_tensor(a) and view.moves(a) and shape(a) == shape(n) for a in n.args)]  # type: ignore[arg-type]
            if not sums:
                continue
            why = cannot_inline(self.flow, view.call, False)
            if why is not None:
                self.kept[view.path] = why
                continue
            inside: set[Call] = set()
            for n in sums:
                for a in n.args:
                    inside.update(self._to_product(view, a) or ())  # type: ignore[arg-type]
            yield _Region(view.call, inside)

    def _to_product(self, view: ModuleGraph, node: fx.Node) -> list[Call] | None:
        """The calls to put in so that a value becomes a product in this forward; None where it is none."""
        if len(node.users) != 1:
            return None
        if node.op == "call_module":
            call = view.call_of(node)
            if self.flow.passes(call) and isinstance(node.args[0], fx.Node):
                return self._to_product(view, node.args[0])
            if call in self.lowered:
                return []
            if cannot_inline(self.flow, call, True) is not None:
                return None
            inside = self.traces.view(call.module)
            assert inside is not None
            result = inside.nodes[-1].args[0]
            more = self._to_product(inside, result) if isinstance(result, fx.Node) else None
            return None if more is None else [call, *more]
        if name_of(node) == "mul" and len(node.args) == 2:
            sizes = [a.meta["val"].numel() if is_tensor(a) else 1 for a in node.args]  # type: ignore[union-attr]
            return [] if min(sizes) < max(sizes) else None
        return None

    # regions

    @staticmethod
    def _merged(regions: list[_Region]) -> list[_Region]:
        """Regions that have no call in common: those that had are one. The way from a root to each call inside is inside."""
        of: dict[Call, _Region] = {}
        for region in regions:
            others = {of[c] for c in (region.root, *region.inside) if c in of}
            together = [region, *others]
            root = min((r.root for r in together), key=lambda c: c.begin)
            calls = {c for r in together for c in (r.root, *r.inside)}
            merged = _Region(root, calls - {root}, [b for r in together for b in r.blocks])
            of.update(dict.fromkeys(calls, merged))
        return list(dict.fromkeys(of.values()))

    def _rewrite(self, region: _Region, changes: _Changes) -> None:
        flat = inline(self.flow, region.root, region.inside, self.persistent)
        for block in sorted(region.blocks, key=lambda b: b.call.begin):
            name = "optimised"
            while hasattr(block.call.module, name):
                name += "_"
            _put_gate(flat, block, name)
            changes.gates.append((block.call.module, name, block.gate))
        done = write_in_place(flat.graph)
        changes.sums += sum(name_of(n) == "add" for n in done)
        if not region.blocks and not done:
            return
        view = self.traces.view(region.root.module)
        assert view is not None
        constants = {k: v for k, v in view.forward.constants.items() if v is None or isinstance(v, (bool, int, float, str))}
        if isinstance(region.root.module, fx.GraphModule):
            changes.classes.append((region.root.module, flat.graph))
        else:
            plain = subgraph(view.forward.graph)
            changes.classes.append((region.root.module, optimized_class(region.root.module, flat.graph, plain, constants)))


def _put_gate(flat: InlinedGraph, block: _Block, name: str) -> None:
    """Compute the gate from its source, by the block's child of this name, and multiply where the block was called."""
    graph = flat.graph
    node = flat.at(block.view.call, block.node)
    source = flat.at(block.source.view.call, block.source.node)
    x = node.args[0]
    assert isinstance(x, fx.Node)
    path, number = f"{node.target}.{name}", 1.0
    with graph.inserting_before(node if not block.source.steps else _next(source)):
        if isinstance(block.gate, MergedGate):
            gate, number = block.gate.put_in(graph, path, source)
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
    for user in node.users:
        user.meta["may_alias"] = [product if n is node else n for n in user.meta.get("may_alias", ())]
    node.replace_all_uses_with(product)
    graph.erase_node(node)
    flat.replaced[node] = product


def _next(node: fx.Node) -> fx.Node:
    """The place behind a node where others can be put; placeholders stay first."""
    after = node.next
    while after.op == "placeholder":
        after = after.next
    return after
