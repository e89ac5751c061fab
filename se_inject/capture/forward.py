"""Trace the forward of one module, with its children as leaves, and give every node its value in a recorded call.

What a trace would lose is refused with its reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import operator
import sys
import types
from collections.abc import Callable, Collection, Hashable, Iterator
from typing import Any, TypeVar

import torch
from torch import fx, nn
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.utils._pytree import tree_map

from ..errors import Refusal
from ..undo import entered
from .arguments import STARS, Unpacked, bound, signature_of
from .author_code import note_code, why_not_held
from .calls import Call
from .containers import leaves
from .graphs import compute, evaluate, subgraph
from .meta_ops import MetaOps, storage
from .passed_on import PassedOn, watched
from .side_effects import Effects, may_draw, modes, other_modes, random_state, state_of
from .snapshot import kept_globals, restored
from .tracer import IN_PLACE, READ_AGAIN, QuickTracer
from .trail import alike, called, first_difference, is_trusted, related, returned

_T = TypeVar("_T")


class _OwnTracer(QuickTracer):
    """Traces one module; every child is a leaf, and arguments that are no tensors are constants.

    Where the forward branches on a value, `decide` gives the outcome.
    """

    def __init__(
        self, constants: dict[str, Any], decide: Callable[[fx.Node], bool] | None, reading: bool, unknown: Collection[str],
        drawing: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.drawing = drawing
        self.unknown = unknown
        self.proxy_buffer_attributes = self.reading = reading
        self.constants = constants
        self.decide = decide
        self.decided: dict[Hashable, bool] = {}
        self.modes = modes()
        self.ran: dict[int, tuple[types.CodeType, frozenset[str]]] = {}  # the author's code, see `note_code`

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if modes() != self.modes:
            raise Refusal("it changes the grad or autocast mode, which a trace does not hold")
        note_code(sys._getframe(1), trace_forward.__code__, self.ran)
        return super().create_node(*args, **kwargs)

    def to_bool(self, obj: fx.Proxy) -> bool:
        if self.decide is None:
            return super().to_bool(obj)
        key = self._spelled(obj.node)
        if key not in self.decided:
            self.decided[key] = self.decide(obj.node)
        return self.decided[key]

    def _spelled(self, node: fx.Node) -> Hashable:
        """A key that equal conditions share."""
        if node.op in ("placeholder", "call_module"):
            return node
        arguments: list[Hashable] = [node.op, node.target]  # type: ignore[list-item]
        fx.map_arg((node.args, node.kwargs), lambda n: arguments.append(self._spelled(n)))
        return (*arguments, repr(fx.map_arg((node.args, node.kwargs), lambda n: None)))

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if m is self.root:
            raise self.refusal("it calls itself")
        return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)  # every child is a leaf

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """A placeholder for each parameter, in the order of the signature, and the arguments to call the forward with.

        fx patches the code of a function with variadic or keyword-only parameters, which breaks decorated ones.
        """
        signature, written = signature_of(root_fn), inspect.unwrap(root_fn)
        args: list[Any] = [self.root]
        named: dict[str, Any] = {}
        for name, parameter in list(signature.parameters.items())[1:]:
            star = STARS.get(parameter.kind, "")
            value: Any = self._proxy_placeholder(star + name, None, signature, written)
            if not star and name not in self.constants and name not in self.unknown:
                self.tensors.add(value.node)
            if name in self.constants:
                constant = self.constants[name]
                value = constant.of(value) if isinstance(constant, (Unpacked, PassedOn)) else constant
            elif star:
                raise Refusal(f"it is called with tensors among {star}{name}")
            if star == "*":
                args += value
            elif star == "**":
                named |= value
            elif parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                named[name] = value
            else:
                args.append(value)
        return functools.partial(root_fn, **named) if named else root_fn, args


def is_plain_sequential(module: nn.Module) -> bool:
    """Whether a module calls all its children one after the other, and holds them, as `nn.Sequential` does."""
    cls: Any = type(module)
    return isinstance(module, nn.Sequential) and _is_plain_sequence(cls)


@functools.lru_cache(maxsize=4096)
def _is_plain_sequence(cls: Any) -> bool:
    return cls.forward is nn.Sequential.forward and all(
        getattr(cls, name).__module__.startswith(("torch.", "se_inject.")) for name in ("__iter__", "__len__", "__getitem__"))


def _chain(module: nn.Module) -> fx.Graph:
    """The graph of a plain `nn.Sequential`, as fx makes it, in a hundredth of the time."""
    graph = fx.Graph()
    value = graph.placeholder("input")
    for name in module._modules:
        value = graph.call_module(name, (value,))
    graph.output(value)
    return graph


ATTEMPTS = 4  # traces of a forward while another thread draws random numbers


def trace_forward(
    module: nn.Module, constants: dict[str, Any], decide: Callable[[fx.Node], bool] | None = None, reading: bool = False,
    unknown: Collection[str] = (), drawing: bool = False,
) -> fx.Graph:
    """Trace `module`'s own forward with its children as leaves. `module` is not changed.

    Args:
        module: The module.
        constants: Its arguments that are no tensors, by name.
        decide: Called with the node of a condition, where the forward branches on a value.
        reading: Whether the trace is only read, and no code is made of it: the forward may then set attributes, and
            operators on buffers are traced.
        unknown: Names of arguments that may be something else than a tensor.
        drawing: Whether the forward may draw random numbers by torch: what draws is then a node.

    Raises:
        Refusal: The forward does something that fx cannot follow.
    """
    if isinstance(module, fx.GraphModule):
        return subgraph(module.graph)
    if is_plain_sequential(module):
        return _chain(module)
    cls: Any = type(module)
    name = cls.__name__
    if "forward" in module.__dict__:
        raise Refusal(f"{name} has a forward of its own instance (as hooks of accelerate set), which is not its class's")
    if any(isinstance(value, types.GeneratorType) for value in module.__dict__.values()):
        raise Refusal(f"{name} holds a generator, which a trace would consume")
    modules = list(module.modules())
    tensors = [t for m in modules for d in (m._parameters, m._buffers) for t in d.values() if t is not None]
    attempts = ATTEMPTS if may_draw(cls) else 1
    for attempt in range(attempts):
        state = random_state() if attempts > 1 else None
        effects = Effects()
        with restored(modules) as changed, kept_globals([cls]) as globals_changed, other_modes(), entered(effects):
            before = state_of(tensors)
            tracer = _OwnTracer(constants, decide, reading, unknown, drawing)
            try:
                with watched(cls, constants) as has_read:
                    graph = tracer.trace(module)
            except MemoryError:
                raise
            except Exception as error:  # fx raises what the traced code raises
                raise Refusal(f"{name}.forward cannot be traced: {tracer.refused or error}") from error
            if tracer.refused is not None:  # which the author's code may have caught
                raise Refusal(f"{name}.forward cannot be traced: {tracer.refused}")
            if not reading and (why := why_not_held(cls, tracer.ran.values())) is not None:
                raise Refusal(f"{name}.forward cannot be traced: {why}")
            if has_read():
                raise Refusal(f"{name}.forward reads its keyword arguments")
            if globals_changed():
                raise Refusal(f"{name}.forward changes a global list or dict, which a trace does not hold")
            has_effects = effects.seen or (attempts > 1 and attempt == attempts - 1 and random_state() != state)
            if not reading and (tracer.sets_attributes or changed() or has_effects or state_of(tensors) != before):
                raise Refusal(
                    f"{name}.forward sets attributes or buffers of its module, or draws random numbers, "
                    "which a trace does not hold")
            if tracer.texts and not reading:
                raise Refusal(f"{name}.forward cannot be traced: it makes a text of a traced value")
        if attempts == 1 or random_state() == state:  # else this forward or another thread has drawn some: trace again
            break
    for node in graph.nodes:
        if node.op == "get_attr" and node.target.startswith("_tensor_constant"):
            raise Refusal(f"{name}.forward makes a tensor that the trace would freeze")
    return graph


@dataclasses.dataclass(eq=False)
class Forward:
    """A module's own forward, traced, with the shapes of one call; modules that are alike share it.

    Attributes:
        graph: Each node's ``meta["val"]`` is its value on meta tensors, ``meta["writes"]`` the storages that it writes into.
        constants: The arguments that are no tensors.
        marker: Name of the empty slot that was filled with a `Marker`.
        decisions: The outcomes of the conditions on sizes, in order.
        trail: The operators that it runs, and the calls of its children, `related`.
        memo: What is known about the forward, for all modules that share it.
    """

    graph: fx.Graph
    constants: dict[str, Any]
    marker: str | None = None
    decisions: tuple[bool, ...] = ()
    trail: tuple[tuple[int, ...], ...] = ()
    memo: dict[Hashable, Any] = dataclasses.field(default_factory=dict)

    def shared(self, what: Hashable, find: Callable[[], _T]) -> _T:
        """The result of `find`, computed once for all modules that share this forward."""
        if what not in self.memo:
            self.memo[what] = find()
        found: _T = self.memo[what]
        return found


class Marker(nn.Module):
    """Fills an empty slot while its owner is traced, so that the author's code shows the slot's place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@contextlib.contextmanager
def marked(module: nn.Module, slot: str) -> Iterator[None]:
    """Inside, a slot of a module is filled with a `Marker`."""
    with restored([module]):  # past a __setattr__, ours or the author's
        module.__dict__["_modules"] = {**module._modules, slot: Marker()}
        module.__dict__.pop(slot, None)
        yield


def not_tensors(values: dict[str, Any]) -> list[str]:
    """The arguments of a call that are something else than a tensor."""
    return [name for name, value in values.items() if not isinstance(value, torch.Tensor)]


def own_forward(call: Call, marker: str | None = None, reading: bool = False) -> tuple[Forward, dict[fx.Node, Call]]:
    """Trace the called module alone; returns the forward, and the recorded calls of children by node.

    With `marker`, the slot of that name is filled while tracing; `reading` is `trace_forward`'s.

    Raises:
        Refusal: fx cannot follow the forward, or the trace does not make the recorded calls.
    """
    constants, values = bound(call)
    decisions: list[bool] = []
    known: dict[fx.Node, Any] = {}

    def decide(node: fx.Node) -> bool:
        decisions.append(bool(evaluate(node, call.module, values, known)))
        return decisions[-1]

    with entered(*() if marker is None else (marked(call.module, marker),)):
        graph = trace_forward(call.module, constants, decide, reading, not_tensors(values))
    env: dict[fx.Node, Any] = {}
    calls: dict[fx.Node, Call] = {}
    children = iter(call.children)
    ops = MetaOps(factories=True)
    with entered(torch.no_grad(), ops):
        for node in graph.nodes:
            before = len(ops.written)
            args = fx.map_arg(node.args, env.__getitem__)
            kwargs = fx.map_arg(node.kwargs, env.__getitem__)
            if node.op == "placeholder":
                value = values.get(str(node.target).lstrip("*"))
            elif node.op == "get_attr":
                value = operator.attrgetter(node.target)(call.module)
            elif node.op == "call_module":
                child = calls[node] = _child_call(call, node, args, kwargs, children, marker)
                ran = len(ops.trail)
                value, writes = _in_memory_of(child, args, kwargs)
                ops.trail[ran:] = [called(leaves(args, kwargs), leaves((value,), {}))]  # for ours, and not of the forward
            elif node.op == "output":
                value = args[0]
                ops.trail.append(returned(leaves((value,), {})))
                if not reading and form_of(value) != form_of(call.output):
                    raise Refusal(
                        f"{type(call.module).__name__}.forward returns a {type(call.output).__name__}, which a trace does not "
                        "make")
            else:
                try:
                    list_or_number = node.target in IN_PLACE and not isinstance(args[0], torch.Tensor)
                    value = IN_PLACE[node.target](*args) if list_or_number else compute(node, args, kwargs)
                except MemoryError:
                    raise
                except Exception as error:
                    raise Refusal(f"{type(call.module).__name__}.forward, node {node}: {error}") from error
            env[node] = node.meta["val"] = value
            node.meta["writes"] = writes if node.op == "call_module" else frozenset(s._cdata for s in ops.written[before:])
    _no_more(call, children)
    _check_writes(graph, call)
    trail = related(ops.trail, leaves(call.args, call.kwargs), call.module)
    if marker is None:  # a filled slot may bring a factor
        _check_operators(call, trail)
    return Forward(graph, constants, marker, tuple(decisions), trail), calls


def form_of(value: Any) -> str:
    """The classes of the containers in what a forward returns, and of what is in them."""
    # a trace has its own classes for lists and dicts
    cls: type[Any] = list if type(value) is immutable_list else dict if type(value) is immutable_dict else type(value)
    name = cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"
    if isinstance(value, dict):
        return f"{name}({', '.join(f'{key}={form_of(v)}' for key, v in value.items())})"
    if isinstance(value, (list, tuple)):
        return f"{name}({', '.join(map(form_of, value))})"
    return "Tensor" if isinstance(value, torch.Tensor) else name


def _in_memory_of(call: Call, args: Any, kwargs: Any) -> tuple[Any, frozenset[int]]:
    """The output of a recorded call and the storages that it wrote into, moved into the memory of these arguments.

    The trace has computed the arguments again, in other memory than the recorded run.
    """
    pairs = [(a, b) for a, b in zip(leaves(call.args, call.kwargs), leaves(args, kwargs)) if isinstance(a, torch.Tensor)]
    given = {id(a): b for a, b in pairs if a is not b}
    if not given:
        return call.output, call.writes
    memory = {storage(a): b for a, b in pairs if isinstance(b, torch.Tensor) and storage(a) != storage(b)}

    def moved(t: Any) -> Any:
        if id(t) in given:
            return given[id(t)]
        if not isinstance(t, torch.Tensor) or storage(t) not in memory:
            return t
        new = memory[storage(t)].as_strided(t.shape, t.stride(), t.storage_offset())
        new.__dict__.update(t.__dict__)  # which axis is which
        return new

    return tree_map(moved, call.output), frozenset(storage(memory[w]) if w in memory else w for w in call.writes)


def _check_operators(call: Call, trail: tuple[tuple[int, ...], ...]) -> None:
    """Check that a trace, evaluated, runs the operators that the module's own forward ran, on the same tensors.

    A forward may ask what a trace cannot see: ``isinstance(x, torch.Tensor)``, ``x.dtype is ...``, a table or a flag. The
    trace then holds another branch or another number.

    Raises:
        Refusal: It runs others.
    """
    if is_trusted(call.module):
        return
    found = first_difference(related(call.own_trail, leaves(call.args, call.kwargs), call.module), trail)
    if found is not None:
        raise Refusal(
            f"{type(call.module).__name__}.forward does something else when traced: {found[1]}, where the model runs "
            f"{found[0]}, perhaps with other numbers")


def _check_writes(graph: fx.Graph, call: Call) -> None:
    """Check that the trace writes into the tensors that the module's own forward wrote into.

    Raises:
        Refusal: It does not.
    """
    name = f"{type(call.module).__name__}.forward"
    traced = 0
    for node in graph.nodes:
        if READ_AGAIN in node.meta and isinstance(node.args[0].meta["val"], torch.Tensor):
            raise Refusal(f"{name} reads a tensor again that it changed in place")
        traced += 0 if node.op == "call_module" else len(node.meta["writes"])
    if traced < len({s._cdata for s in call.own_writes}):
        raise Refusal(f"{name} changes a tensor in place, and the trace does not")


def bind(forward: Forward, call: Call) -> dict[fx.Node, Call]:
    """The recorded child calls of `call`, by the nodes of a forward that a module like it was traced with.

    Raises:
        Refusal: The call took another path.
    """
    calls: dict[fx.Node, Call] = {}
    children = iter(call.children)
    for node in forward.graph.nodes:
        if node.op == "call_module":
            args, kwargs = (fx.map_arg(a, lambda n: n.meta["val"]) for a in (node.args, node.kwargs))
            calls[node] = _child_call(call, node, args, kwargs, children, forward.marker)
    _no_more(call, children)
    if forward.marker is None:
        _check_operators(call, forward.trail)
    return calls


def _child_call(
    call: Call, node: fx.Node, args: Any, kwargs: Any, children: Iterator[Call], marker: str | None
) -> Call:
    if node.target == marker:  # put there after the recording
        return Call("", Marker(), args, {}, call, call.begin, call.begin, args[0])
    target = call.module.get_submodule(str(node.target))
    child = next(children, None)
    if child is None or child.module is not target or not alike((args, kwargs), (child.args, child.kwargs)):
        raise _another_path(call)
    return child


def _no_more(call: Call, children: Iterator[Call]) -> None:
    if next(children, None) is not None:
        raise _another_path(call)


def _another_path(call: Call) -> Refusal:
    return Refusal(f"{type(call.module).__name__}.forward took another path when traced")
