"""A traced forward as a graph with answers: which nodes are learned or nonlinear work, and what comes from what."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from torch import fx, nn

from ..capture.calls import Call, Run
from ..capture.channels import channel_axis
from ..capture.containers import tensors_in
from ..capture.fingerprint import Fingerprints, frozen
from ..capture.forward import Forward, bind, own_forward
from ..capture.meta_ops import storage
from ..capture.trail import PLAIN
from ..errors import Refusal
from . import ops
from .layers import is_layer, is_weight, mixes
from .ops import is_tensor, shape

_T = TypeVar("_T")
_WITHOUT_TENSORS = (*PLAIN, torch.Size)  # saves a walk


class TracedModel:
    """The modules of one recorded run, each traced once, when it is first asked for. Those `hooked` have hooks of a user."""

    def __init__(self, run: Run, hooked: Collection[nn.Module] = ()) -> None:
        self.run = run
        self.hooked = hooked
        self.root = run.root
        self.calls: dict[nn.Module, list[Call]] = {}
        for call in run.root.walk():
            self.calls.setdefault(call.module, []).append(call)
        self.fingerprints = Fingerprints(run.root.module)
        self._views: dict[nn.Module, ModuleGraph | None] = {}
        self._inside: dict[Call, ModuleGraph] = {}
        self._forwards: dict[Hashable, Forward] = {}
        self.failures: dict[nn.Module, str] = {}
        self._linear: dict[Hashable, bool] = {}
        self._weighty: dict[nn.Module, bool] = {}

    def view(self, module: nn.Module) -> ModuleGraph | None:
        """The traced forward of `module`, or None for a leaf and for what fx cannot follow."""
        if module not in self._views:
            view = None
            if self._composes(module):
                try:
                    self._check_ends(module)
                    view = self._view(self.calls[module][0])
                except Refusal as error:
                    self.failures[module] = str(error)
            self._views[module] = view
        return self._views[module]

    def inside(self, call: Call) -> ModuleGraph:
        """The traced forward of any call, to be read and not rewritten.

        Unlike `view`, it also gives torch's own layers, and forwards that set attributes.

        Raises:
            Refusal: fx cannot follow it.
        """
        view = self.view(call.module)
        if view is not None and view.call is call:
            return view
        self._check_ends(call.module)
        if call not in self._inside:
            self._inside[call] = self._view(call, reading=view is None)
        return self._inside[call]

    def _check_ends(self, module: nn.Module) -> None:
        """Raise for a module in which the recorded run ended.

        Raises:
            Refusal: It did.
        """
        if self.run.ended is not None and any(call.end < 0 for call in self.calls[module]):
            raise Refusal(self.run.ended)

    def _view(self, call: Call, reading: bool = False) -> ModuleGraph:
        """The graph of a called module; modules with one fingerprint share a trace."""
        key = (self.fingerprints.of(call.module), frozen(call.args), frozen(call.kwargs), reading)
        forward = self._forwards.get(key)
        if forward is not None:
            with contextlib.suppress(Refusal):  # it took another path, or two of its arguments are one tensor: trace it
                return ModuleGraph(forward, call, bind(forward, call), self)
        forward, calls = own_forward(call, reading=reading)
        self._forwards[key] = forward
        return ModuleGraph(forward, call, calls, self)

    def _composes(self, module: nn.Module) -> bool:
        cls: Any = type(module)
        return module in self.calls and not is_layer(cls)

    def has_weights(self, module: nn.Module) -> bool:
        if module not in self._weighty:
            self._weighty[module] = mixes(module) or any(
                self.has_weights(child) for child in module._modules.values() if child is not None)
        return self._weighty[module]

    def scales(self, module: nn.Module) -> bool:
        """Whether a module does nothing but multiply its input by parameters or numbers (layer scale)."""
        if self.has_weights(module) or any(True for _ in module.children()):
            return False
        view = self.view(module)
        return view is not None and view.scaled_input(view.nodes[-1].args[0])

    def is_linear(self, module: nn.Module) -> bool:
        """Whether a module is linear in its input, norms included. A module that cannot be traced is not."""
        key: Hashable = module
        children = list(module.children())
        cls: Any = type(module)
        if is_layer(cls) and not any(child._modules for child in children):  # once for all sizes
            flags = tuple((name, value) for name, value in vars(module).items() if isinstance(value, (bool, str)))
            key = (cls, flags, *map(type, children))
        if key not in self._linear:
            try:
                view = self.inside(self.calls[module][0])
                self._linear[key] = not any(map(view.is_nonlinear, view.nodes))
            except Refusal:
                self._linear[key] = False
        return self._linear[key]


SAME, SCALE, SLICE, LAYOUT = "same", "scale", "slice", "layout"


class Step(NamedTuple):
    """From `node` back to the value that it passes on, a tensor, or for a part also a list of tensors.

    `kind` is ``same`` (identity, dropout, drop path), ``scale`` (by parameters or numbers), ``slice`` (a part) or ``layout``
    (another shape, order or dtype).
    """

    kind: str
    node: fx.Node
    source: fx.Node


class ModuleGraph:
    """The traced forward of one module, with answers about its nodes.

    Sets of nodes are bit masks over positions in the graph, so that ancestry costs one pass.
    """

    def __init__(self, forward: Forward, call: Call, calls: dict[fx.Node, Call], traces: TracedModel) -> None:
        self.forward = forward
        self.call = call
        self._calls = calls
        self.traces = traces
        self.nodes: list[fx.Node] = self.shared("nodes", lambda: list(forward.graph.nodes))
        self.index: dict[fx.Node, int] = self.shared("index", lambda: {n: i for i, n in enumerate(self.nodes)})

    def shared(self, what: Hashable, find: Callable[[], _T]) -> _T:
        """The result of `find`, computed once for all modules that share this forward."""
        return self.forward.shared(what, find)

    @property
    def last_writes(self) -> dict[int, int]:
        """For each storage that is written into, the position of the last node that does."""
        return self.shared("last writes", lambda: {s: i for i, n in enumerate(self.nodes) for s in n.meta.get("writes", ())})

    def is_written_after(self, node: fx.Node) -> bool:
        """Whether something later in the forward writes into the memory of `node`'s value."""
        return self.last_writes.get(storage(node.meta["val"]), -1) > self.index[node]

    def writes_between(self, node: fx.Node, end: fx.Node) -> set[int]:
        """The storages that are written into between two nodes."""
        return {s for n in self.nodes[self.index[node] + 1:self.index[end]] for s in n.meta.get("writes", ())}

    @property
    def path(self) -> str:
        return self.call.path

    @property
    def module(self) -> nn.Module:
        return self.call.module

    def call_of(self, node: fx.Node) -> Call:
        """The recorded call of a ``call_module`` node."""
        return self._calls[node]

    @cached_property
    def node_of(self) -> dict[Call, fx.Node]:
        """The ``call_module`` node of each recorded call."""
        return {call: node for node, call in self._calls.items()}

    @cached_property
    def ancestors(self) -> list[int]:
        """For each node the mask of itself and of the nodes whose data reaches it as tensors."""
        return self.shared("ancestors", self._ancestors)

    def _ancestors(self) -> list[int]:
        masks: list[int] = []
        for i, node in enumerate(self.nodes):
            mask = 1 << i
            for source in node.all_input_nodes:
                if self.carries_data(source):
                    mask |= masks[self.index[source]]
            masks.append(mask)
        return masks

    def carries_data(self, node: fx.Node) -> bool:
        """Whether a node holds activations: a tensor, or a container of them, that is no parameter."""
        if node.op == "get_attr":
            return False
        value = node.meta.get("val")
        return isinstance(value, torch.Tensor) or (
            not isinstance(value, _WITHOUT_TENSORS) and bool(tensors_in(value)))

    def readers(self, node: fx.Node) -> list[fx.Node]:
        """The users of a value that may read its elements: those that only ask for its sizes are left out."""
        return [u for u in node.users if u.op in ("output", "call_module") or self.carries_data(u)]

    def members(self, mask: int) -> list[fx.Node]:
        out = []
        while mask:
            low = mask & -mask
            out.append(self.nodes[low.bit_length() - 1])
            mask ^= low
        return out

    def fork(self, nodes: Iterable[fx.Node]) -> fx.Node | None:
        """The last activation that all of `nodes` come from: a tensor, or several in one value (chunks)."""
        common = -1
        for node in nodes:
            common &= self.ancestors[self.index[node]]
        while common:
            i = common.bit_length() - 1
            if self.carries_data(self.nodes[i]):
                return self.nodes[i]
            common ^= 1 << i
        return None

    def sources(self, node: fx.Node) -> list[fx.Node]:
        """The activations that `node` is computed from."""
        return [n for n in node.all_input_nodes if self.carries_data(n)]

    @cached_property
    def moving(self) -> int:
        """Mask of the nodes that depend on the module's input or on what its children compute."""
        return self.shared("moving", self._moving)

    def _moving(self) -> int:
        mask = 0
        for i, node in enumerate(self.nodes):
            if node.op in ("placeholder", "call_module") or any(mask >> self.index[n] & 1 for n in self.sources(node)):
                mask |= 1 << i
        return mask

    def moves(self, node: fx.Node) -> bool:
        return bool(self.moving >> self.index[node] & 1)

    def region(self, node: fx.Node, fork: fx.Node | None) -> int:
        """Mask of the nodes between `fork` and `node`, with `node`, without `fork`."""
        mask = self.ancestors[self.index[node]]
        return mask if fork is None else mask & ~self.ancestors[self.index[fork]]

    def is_learned(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return self.traces.has_weights(self._calls[node].module)
        if node.op == "get_attr":
            value = node.meta["val"]
            return isinstance(value, torch.Tensor) and is_weight(value)
        return False

    def is_nonlinear(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return not self._calls[node].passes and not self.traces.is_linear(self._calls[node].module)
        if node.op not in ("call_function", "call_method") or not self.moves(node):
            return False
        if not self.carries_data(node) and not isinstance(node.meta.get("val"), torch.Tensor):
            return False  # sizes and other plain values
        op = ops.of(node)

        def varying(names: tuple[str, ...]) -> int:
            found = (ops.argument(node, name) for name in names)
            return sum(is_tensor(a) and self.moves(a) for a in found)

        return not (op.normalizes or (op.linear and varying(op.factors) <= 1 and not varying(op.fixed)))

    def work(self, mask: int) -> int:
        """Number of learned layers called in a set of nodes."""
        count = 0
        for node in self.members(mask):
            if node.op == "call_module":
                count += sum(
                    1 for c in self._calls[node].walk()
                    if mixes(c.module))
            elif self.is_learned(node):
                count += 1
        return count

    def learned(self, mask: int) -> bool:
        return any(self._uses_weight(n) for n in self.members(mask))

    def _uses_weight(self, node: fx.Node) -> bool:
        return self.is_learned(node) or any(
            s.op == "get_attr" and self.is_learned(s) for s in node.all_input_nodes)

    def nonlinear(self, mask: int) -> bool:
        return any(self.is_nonlinear(n) for n in self.members(mask))

    def calls(self, mask: int) -> list[Call]:
        return [self._calls[n] for n in self.members(mask) if n.op == "call_module"]

    def calls_before(self, node: fx.Node) -> Iterator[fx.Node]:
        """The calls of modules that lead to `node`, itself included, the last first."""
        mask = self.ancestors[self.index[node]]
        while mask:
            i = mask.bit_length() - 1
            mask ^= 1 << i
            if self.nodes[i].op == "call_module":
                yield self.nodes[i]

    def channel_dim(self, node: fx.Node) -> int:
        """The axis of an activation's channels: 1 in NCHW, NCL and NCDHW, the last in NHWC, NLC and NDHWC.

        Where the run lost it, the learned layer before `node` tells it.
        """
        dims = shape(node)
        axis = channel_axis(node.meta["val"])
        if axis is not None:
            return axis
        for earlier in reversed(self.members(self.ancestors[self.index[node]])):
            if earlier.op == "call_module":
                for call in reversed(list(self._calls[earlier].walk())):
                    weight = call.module._parameters.get("weight")
                    if weight is None or not mixes(call.module):
                        continue
                    if weight.dim() == 2:
                        return len(dims) - 1
                    return 1 if isinstance(call.output, torch.Tensor) and call.output.dim() == len(dims) else (
                        len(dims) - 1 if len(dims) == 3 else 1)
        return 1 if len(dims) > 3 else len(dims) - 1

    def steps_back(self, node: fx.Node) -> Iterator[Step]:
        """From a value back through what only passes it on; ends at the operator, layer or input that makes it."""
        while (step := self._step_back(node)) is not None:
            yield step
            node = step.source

    def _step_back(self, node: fx.Node) -> Step | None:
        op = ops.of(node)
        first: Any = ops.argument(node, "input") if op.name else None
        if node.op == "call_module":
            first = node.args[0] if len(node.args) == 1 and not node.kwargs and self.passes(node) else None
            kind = SAME if isinstance(first, fx.Node) and self._calls[node].passes else SCALE
        elif op.drops:
            kind = SAME
        elif op.slices:
            kind = SLICE
        elif op.views or op.casts:
            kind = LAYOUT
        else:
            first, kind = self.scaled(node), SCALE
        return Step(kind, node, first) if is_tensor(first) or (kind == SLICE and isinstance(first, fx.Node)) else None

    def scaled(self, node: fx.Node) -> fx.Node | None:
        """For a product of an activation with a parameter or a number, the activation."""
        return next((
            x for x, k in ops.products(node) if self.moves(x) and (
                isinstance(k, (int, float)) or (isinstance(k, fx.Node) and not (is_tensor(k) and self.moves(k))))), None)

    def scaled_input(self, node: Any) -> bool:
        """Whether a value is an input of the module, times constants."""
        scaled = False
        while isinstance(node, fx.Node) and node.op != "placeholder":
            node, scaled = self.scaled(node), True
        return isinstance(node, fx.Node) and scaled

    def passes(self, node: fx.Node) -> bool:
        """Whether a call only scales its input by parameters, or in eval mode returns it unchanged."""
        call = self._calls[node]
        return call.passes or self.traces.scales(call.module)


def spelled(node: fx.Node, view: ModuleGraph | None = None) -> str:
    """A node by the name that a reader of the model knows."""
    if node.op == "call_module":
        return f"{view.path}.{node.target}" if view is not None and view.path else str(node.target)
    return "the output" if node.op == "output" else str(getattr(node.target, "__name__", node.target))
