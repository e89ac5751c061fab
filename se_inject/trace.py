"""Run a model once without computing, and trace the forward of single modules.

A whole-model graph loses module boundaries, and those are what gets rewritten. So the model is run
once, eagerly, on meta tensors, which records every module call with its shapes; then each module
that composes others is traced alone, with its children as leaves. The recorded calls give the
shapes of the traced nodes, and prove that the trace took the path that the model takes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import operator
import random
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from .errors import TraceError
from .meta import MetaOps, storage

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOK_FLAGS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")


@dataclasses.dataclass(eq=False)
class Call:
    """One call of a module during the recorded run.

    `begin` and `end` number the calls in order, so that `a.begin < b.begin < a.end` says that call
    `b` happened inside call `a`. `changes_list` says that a list among the arguments was changed, `operators`
    how many operators ran inside, `writes` into which of its arguments' storages they wrote, and `own_writes` into
    which storages its own forward did.
    """

    path: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    parent: Call | None
    begin: int
    end: int = -1
    output: Any = None
    changes_list: bool = False
    operators: int = 0
    writes: frozenset[int] = frozenset()
    own_writes: tuple[torch.UntypedStorage, ...] = ()
    children: list[Call] = dataclasses.field(default_factory=list)

    def walk(self) -> Iterator[Call]:
        """This call and all calls inside it, in the order of their beginning."""
        yield self
        for child in self.children:
            yield from child.walk()

    @property
    def passes(self) -> bool:
        """Whether the call returned the very tensor that it was given: identity, dropout and drop path in eval mode."""
        return self.operators == 0 and isinstance(self.output, torch.Tensor) and bool(self.args) and (
            self.output is self.args[0])


@dataclasses.dataclass(eq=False)
class Forward:
    """A module's own forward, traced, with the shapes of one call; modules that are alike share it.

    Each node's ``meta["val"]`` is its value on meta tensors. `constants` are the arguments that were not
    tensors; `marker` names the empty slot that was filled with a `Marker`; `decisions` say which way the
    forward went, in order, where it branches on sizes. `memo` keeps what was found out about the forward,
    for all who share it.
    """

    graph: fx.Graph
    constants: dict[str, Any]
    marker: str | None = None
    decisions: tuple[bool, ...] = ()
    memo: dict[Hashable, Any] = dataclasses.field(default_factory=dict)


@contextlib.contextmanager
def untouched(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Whatever happens inside, each module's class and attributes are afterwards the very objects they were.

    Lists and dicts among them are copies inside: a forward may keep a cache there.
    """
    saved = [(m, m.__class__, dict(m.__dict__)) for m in modules]
    try:
        for m, _, attributes in saved:
            for key, value in attributes.items():
                if type(value) in (dict, list):
                    m.__dict__[key] = value.copy()
        yield
    finally:
        for m, cls, attributes in saved:
            m.__class__ = cls
            m.__dict__.clear()
            m.__dict__.update(attributes)


@contextlib.contextmanager
def abstract(model: nn.Module) -> Iterator[None]:
    """Inside, `model` is in eval mode, without hooks, and its tensors are on the meta device."""
    modules = list(model.modules())
    twins: dict[int, torch.Tensor] = {}

    def meta(t: Any) -> Any:
        if not isinstance(t, torch.Tensor) or t.is_meta:
            return t
        if id(t) not in twins:
            twin = torch.empty_like(t, device="meta")
            twins[id(t)] = nn.Parameter(twin, requires_grad=False) if isinstance(t, nn.Parameter) else twin
        return twins[id(t)]

    with untouched(modules):
        for m in modules:
            d = m.__dict__
            for key, value in list(d.items()):
                if isinstance(value, torch.Tensor):
                    d[key] = meta(value)
                elif type(value) is list:
                    d[key] = [meta(v) for v in value]
                elif type(value) is dict:
                    d[key] = {k: meta(v) for k, v in value.items()}
            for key in ("_parameters", "_buffers"):
                d[key] = {name: meta(t) for name, t in d[key].items()}
            d["_modules"] = dict(d["_modules"])
            for key in (*_HOOKS, *_HOOK_FLAGS):
                if d[key]:
                    d[key] = OrderedDict()
            d["training"] = False
        yield


def _same(value: Any) -> Any:
    return value


def run(model: nn.Module, inputs: torch.Tensor, ops: MetaOps | None = None) -> int:
    """Run `model` once, without computing, and return its multiply-adds. Use it inside `abstract`.

    Raises:
        TraceError: The model's own forward raised on this input.
    """
    ops = ops or MetaOps(factories=True)
    try:
        with untouched(list(model.modules())), torch.no_grad(), ops:
            model(inputs)
            return ops.macs
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} failed on an input of shape {tuple(inputs.shape)}: "
            f"{type(error).__name__}: {error}. If the model needs another size, pass input_size=(C, H, W)."
        ) from error


def record(model: nn.Module, inputs: torch.Tensor) -> tuple[Call, int]:
    """Run `model` once and return the call of its root, and its multiply-adds. Use it inside `abstract`.

    Raises:
        TraceError: The model's own forward raised on this input.
    """
    paths = {m: name for name, m in model.named_modules()}
    stack: list[Call] = []
    root: list[Call] = []
    count = 0
    ops = MetaOps(factories=True)
    written: list[int] = []
    own: list[list[torch.UntypedStorage]] = []
    taken = 0

    def take_writes() -> None:
        nonlocal taken
        if own:
            own[-1] += ops.written[taken:]
        taken = len(ops.written)

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal count
        parent = stack[-1] if stack else None
        args, kwargs = tree_map(_same, (args, kwargs))  # a list may grow during the call
        call = Call(paths[module], module, args, kwargs, parent, count, operators=-ops.operators)
        count += 1
        (parent.children if parent else root).append(call)
        take_writes()
        stack.append(call)
        own.append([])
        written.append(len(ops.written))

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        nonlocal count
        call = stack.pop()
        call.output, call.end = output, count
        call.operators += ops.operators
        since = ops.written[written.pop():]
        if since:
            given = {storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
            call.writes = frozenset(s._cdata for s in since) & given
        take_writes()
        call.own_writes = tuple(own.pop())
        call.changes_list = not _alike((args, kwargs), (call.args, call.kwargs))
        count += 1

    handles = []
    try:
        for module in paths:
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave, with_kwargs=True))
        macs = run(model, inputs, ops)
    finally:
        for handle in handles:
            handle.remove()
    return root[0], macs


@dataclasses.dataclass(frozen=True)
class Unpacked:
    """Stands among the constants for an argument that is a list or tuple of tensors and sizes, of fixed length.

    A forward that asks whether it got a list must see one while it is traced. `items` are None, or an
    `Unpacked` for an item that is a list itself.
    """

    kind: type
    items: tuple[Unpacked | None, ...]

    @classmethod
    def like(cls, value: Any) -> Unpacked | None:
        """For a list or tuple of tensors, sizes and such lists; None for anything else."""
        if type(value) not in (list, tuple, torch.Size) or not value:
            return None
        items = [cls.like(v) for v in value]
        if any(i is None and not isinstance(v, torch.Tensor) and type(v) is not int for i, v in zip(items, value)):
            return None
        return cls(list if type(value) is list else tuple, tuple(items))

    def of(self, proxy: Any) -> Any:
        """The items of a traced argument, in the container that the forward expects."""
        return self.kind(proxy[i] if item is None else item.of(proxy[i]) for i, item in enumerate(self.items))


def _modes() -> tuple[object, ...]:
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *(
        (torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")))


@contextlib.contextmanager
def _other_modes() -> Iterator[None]:
    """Inside, grad and autocast are on, to a dtype that no forward asks for, so that a forward shows where it sets them."""
    was = {d: (torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")}
    with torch.enable_grad():
        try:
            for d in was:
                torch.set_autocast_enabled(d, True)
                torch.set_autocast_dtype(d, torch.float64)
            yield
        finally:
            for d, (enabled, dtype) in was.items():
                torch.set_autocast_enabled(d, enabled)
                torch.set_autocast_dtype(d, dtype)


def _state(module: nn.Module) -> tuple[object, ...]:
    """What a forward must leave alone to be traced: attributes, buffers, modes, and Python's and torch's random numbers."""
    own = {
        key: (id(value), tuple(map(id, value.values() if isinstance(value, dict) else value)))
        if type(value) in (dict, list) else id(value) for key, value in module.__dict__.items()}
    versions = tuple(t._version for d in (module._parameters, module._buffers) for t in d.values() if t is not None)
    modes = tuple(m.training for m in module.modules())
    return own, versions, modes, random.getstate()[1], torch.get_rng_state().numpy().tobytes()


class _OwnTracer(fx.Tracer):
    """Traces one module; every child is a leaf, and arguments that are no tensors are constants.

    Where the forward branches on a value, `decide` says which way it goes.
    """

    def __init__(self, constants: dict[str, Any], decide: Callable[[fx.Node], bool] | None) -> None:
        from timm.models._features_fx import get_notrace_functions

        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self.constants = constants
        self.decide = decide
        self.decided: dict[Hashable, bool] = {}
        self.modes = _modes()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self.modes:
            raise TraceError("it changes the grad or autocast mode, which a trace does not hold")
        return super().create_node(*args, **kwargs)

    def to_bool(self, obj: fx.Proxy) -> bool:
        if self.decide is None:
            return super().to_bool(obj)
        key = self._spelled(obj.node)
        if key not in self.decided:
            self.decided[key] = self.decide(obj.node)
        return self.decided[key]

    def _spelled(self, node: fx.Node) -> Hashable:
        """The same for conditions that are written again."""
        if node.op in ("placeholder", "call_module"):
            return node
        arguments: list[Hashable] = [node.op, node.target]  # type: ignore[list-item]
        fx.map_arg((node.args, node.kwargs), lambda n: arguments.append(self._spelled(n)))
        return (*arguments, repr(fx.map_arg((node.args, node.kwargs), lambda n: None)))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        fn, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        names = iter(inspect.signature(root_fn).parameters)
        next(names)  # self
        for i, name in enumerate(names, start=1):
            if name in self.constants and i < len(args):
                value = self.constants[name]
                args[i] = value.of(args[i]) if isinstance(value, Unpacked) else value
        return fn, args


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """The same nodes in the same order, without what is known about them."""
    new = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        copies[node] = new.node_copy(node, copies.__getitem__)
        copies[node].meta = {}
    return new


def is_plain_sequential(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _chain(module: nn.Module) -> fx.Graph:
    """What fx would make of a plain `nn.Sequential`, in a hundredth of the time."""
    graph = fx.Graph()
    value = graph.placeholder("input")
    for name in module._modules:
        value = graph.call_module(name, (value,))
    graph.output(value)
    return graph


def trace_forward(
    module: nn.Module, constants: dict[str, Any], decide: Callable[[fx.Node], bool] | None = None
) -> fx.Graph:
    """Trace `module`'s own forward with its children as leaves. `module` is not changed.

    `decide` is asked, with the node of the condition, wherever the forward branches on a value.

    Raises:
        TraceError: The forward does something that fx cannot follow.
    """
    if isinstance(module, fx.GraphModule):
        return copy_graph(module.graph)
    if is_plain_sequential(module):
        return _chain(module)
    kinds = [p.kind for p in inspect.signature(type(module).forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds and inspect.Parameter.KEYWORD_ONLY in kinds:
        raise TraceError(f"{type(module).__name__}.forward has keyword arguments behind *args, which fx mixes up")
    with untouched([module]), _other_modes():
        before = _state(module)
        try:
            graph = _OwnTracer(constants, decide).trace(module)
        except Exception as error:  # fx raises what the traced code raises
            raise TraceError(f"{type(module).__name__}.forward cannot be traced: {error}") from error
        if _state(module) != before:
            raise TraceError(
                f"{type(module).__name__}.forward sets attributes or buffers of its module, or draws random numbers, "
                "which a trace does not hold")
    for node in graph.nodes:
        if node.op == "get_attr" and node.target.startswith("_tensor_constant"):
            raise TraceError(f"{type(module).__name__}.forward makes a tensor that the trace would freeze")
    return graph


class Marker(nn.Module):
    """Stands in an empty slot while its owner is traced, so that the author's code shows the slot's place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def own_forward(call: Call, marker: str | None = None) -> tuple[Forward, dict[fx.Node, Call]]:
    """Trace the called module alone, give every node its value in this call, and every call of a child its record.

    With `marker`, the slot of that name is filled while tracing.

    Raises:
        TraceError: fx cannot follow the forward, or the trace does not make the calls that were recorded.
    """
    constants, values = _bind(call)
    decisions: list[bool] = []
    known: dict[fx.Node, Any] = {}

    def decide(node: fx.Node) -> bool:
        decisions.append(bool(_evaluate(node, values, known)))
        return decisions[-1]

    with untouched([call.module]):
        if marker is not None:  # past a __setattr__, ours or the author's
            call.module.__dict__["_modules"] = {**call.module._modules, marker: Marker()}
            call.module.__dict__.pop(marker, None)
        graph = trace_forward(call.module, constants, decide)
    env: dict[fx.Node, Any] = {}
    calls: dict[fx.Node, Call] = {}
    children = iter(call.children)
    with torch.no_grad(), MetaOps(factories=True) as ops:
        for node in graph.nodes:
            before = len(ops.written)
            args = fx.map_arg(node.args, env.__getitem__)
            kwargs = fx.map_arg(node.kwargs, env.__getitem__)
            if node.op == "placeholder":
                value = values.get(str(node.target).lstrip("*"))
            elif node.op == "get_attr":
                value = operator.attrgetter(node.target)(call.module)
            elif node.op == "call_module":
                calls[node] = _child_call(call, node, args, kwargs, children, marker)
                value = calls[node].output
            elif node.op == "output":
                value = args[0]
            else:
                try:
                    if node.op == "call_function":
                        value = node.target(*args, **kwargs)
                    else:
                        value = getattr(args[0], node.target)(*args[1:], **kwargs)
                except Exception as error:
                    raise TraceError(f"{type(call.module).__name__}.forward, node {node}: {error}") from error
            env[node] = node.meta["val"] = value
            node.meta["writes"] = calls[node].writes if node.op == "call_module" else frozenset(
                s._cdata for s in ops.written[before:])
    _no_more(call, children)
    _check_rereads(graph, call)
    return Forward(graph, constants, marker, tuple(decisions)), calls


_ALSO_IN_PLACE = {operator.add, operator.sub, operator.mul, operator.truediv}


def _check_rereads(graph: fx.Graph, call: Call) -> None:
    """Where fx has made ``x = x + y`` of ``x += y``: that nothing reads the memory that was written into.

    Raises:
        TraceError: Something does.
    """
    written = {s._cdata for s in call.own_writes}
    index = {node: i for i, node in enumerate(graph.nodes)} if written else {}
    for node in graph.nodes if written else ():
        first = node.args[0] if node.op == "call_function" and node.target in _ALSO_IN_PLACE else None
        value = first.meta["val"] if isinstance(first, fx.Node) else None
        if isinstance(value, torch.Tensor) and storage(value) in written and any(
                index[u] > index[node] for u in first.users):  # type: ignore[union-attr]
            raise TraceError(f"{type(call.module).__name__}.forward reads a tensor again that it has changed in place")


def _evaluate(node: fx.Node, values: dict[str, Any], known: dict[fx.Node, Any]) -> Any:
    """The value of a node that depends on the arguments' sizes alone.

    Raises:
        TraceError: It depends on what is in a tensor, or on a child.
    """
    if node not in known:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: _evaluate(n, values, known))
        if node.op == "placeholder":
            known[node] = values.get(str(node.target).lstrip("*"))
        elif node.op == "call_function":
            known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        elif node.op == "call_method":
            known[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            raise TraceError("it branches on what its layers compute")
    return known[node]


def bind(forward: Forward, call: Call) -> dict[fx.Node, Call]:
    """The recorded child calls of `call`, by the nodes of a forward that a module like it was traced with.

    Raises:
        TraceError: The call took another path.
    """
    calls: dict[fx.Node, Call] = {}
    children = iter(call.children)
    for node in forward.graph.nodes:
        if node.op == "call_module":
            args, kwargs = (fx.map_arg(a, lambda n: n.meta["val"]) for a in (node.args, node.kwargs))
            calls[node] = _child_call(call, node, args, kwargs, children, forward.marker)
    _no_more(call, children)
    return calls


def _child_call(
    call: Call, node: fx.Node, args: Any, kwargs: Any, children: Iterator[Call], marker: str | None
) -> Call:
    if node.target == marker:  # put there after the recording
        return Call("", Marker(), args, {}, call, call.begin, call.begin, args[0])
    target = call.module.get_submodule(str(node.target))
    child = next(children, None)
    if child is None or child.module is not target or not _alike((args, kwargs), (child.args, child.kwargs)):
        raise _another_path(call)
    return child


def _no_more(call: Call, children: Iterator[Call]) -> None:
    if next(children, None) is not None:
        raise _another_path(call)


def _another_path(call: Call) -> TraceError:
    return TraceError(f"{type(call.module).__name__}.forward took another path when traced")


def _alike(a: Any, b: Any) -> bool:
    """Whether two arguments have the same structure and shapes."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.shape == b.shape
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_alike(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_alike, a, b))
    return True


def _bind(call: Call) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a call's arguments into constants and tensors, both by parameter name."""
    signature = inspect.signature(type(call.module).forward)
    bound = signature.bind(call.module, *call.args, **call.kwargs)
    bound.apply_defaults()
    constants, values = {}, {}
    for i, (name, value) in enumerate(bound.arguments.items()):
        if i == 0:  # self
            continue
        values[name] = value
        variadic = signature.parameters[name].kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        unpacked = None if variadic else Unpacked.like(value)
        if unpacked is not None:
            constants[name] = unpacked
        elif not variadic and not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value)):
            constants[name] = value
    return constants, values
