"""A recorded call and its traced forward, put together: every node has its value, every call of a child its record."""

from __future__ import annotations

import dataclasses
import inspect
import operator
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from .errors import TraceError
from .meta import MetaOps, storage
from .record import Call, alike, untouched
from .trace import Unpacked, signature_of, trace_forward
from .tracer import IN_PLACE, READ_AGAIN


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


class Marker(nn.Module):
    """Stands in an empty slot while its owner is traced, so that the author's code shows the slot's place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def own_forward(call: Call, marker: str | None = None, reading: bool = False) -> tuple[Forward, dict[fx.Node, Call]]:
    """Trace the called module alone, give every node its value in this call, and every call of a child its record.

    With `marker`, the slot of that name is filled while tracing; `reading` is `trace_forward`'s.

    Raises:
        TraceError: fx cannot follow the forward, or the trace does not make the calls that were recorded.
    """
    constants, values = _bind(call)
    decisions: list[bool] = []
    known: dict[fx.Node, Any] = {}

    def decide(node: fx.Node) -> bool:
        decisions.append(bool(_evaluate(node, call.module, values, known)))
        return decisions[-1]

    with untouched([call.module]):
        if marker is not None:  # past a __setattr__, ours or the author's
            call.module.__dict__["_modules"] = {**call.module._modules, marker: Marker()}
            call.module.__dict__.pop(marker, None)
        graph = trace_forward(call.module, constants, decide, reading)
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
                child = calls[node] = _child_call(call, node, args, kwargs, children, marker)
                value, writes = _in_memory_of(child, args, kwargs)
            elif node.op == "output":
                value = args[0]
            else:
                try:
                    if node.op == "call_function":
                        list_or_number = node.target in IN_PLACE and not isinstance(args[0], torch.Tensor)
                        value = (IN_PLACE[node.target] if list_or_number else node.target)(*args, **kwargs)
                    else:
                        value = getattr(args[0], node.target)(*args[1:], **kwargs)
                except Exception as error:
                    raise TraceError(f"{type(call.module).__name__}.forward, node {node}: {error}") from error
            env[node] = node.meta["val"] = value
            node.meta["writes"] = writes if node.op == "call_module" else frozenset(s._cdata for s in ops.written[before:])
    _no_more(call, children)
    _check_writes(graph, call)
    return Forward(graph, constants, marker, tuple(decisions)), calls


def _in_memory_of(call: Call, args: Any, kwargs: Any) -> tuple[Any, frozenset[int]]:
    """What a recorded call returned, and the storages that it wrote into, as if it had been given these arguments, which the
    trace has computed anew."""
    pairs = zip(tree_leaves((call.args, call.kwargs)), tree_leaves((args, kwargs)))
    memory = {storage(a): b for a, b in pairs if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and (
        storage(a) != storage(b))}
    if not memory:
        return call.output, call.writes

    def moved(t: Any) -> Any:
        if not isinstance(t, torch.Tensor) or storage(t) not in memory:
            return t
        new = memory[storage(t)].as_strided(t.shape, t.stride(), t.storage_offset())
        new.__dict__.update(t.__dict__)  # which axis is which
        return new

    return tree_map(moved, call.output), frozenset(storage(memory[w]) if w in memory else w for w in call.writes)


def _check_writes(graph: fx.Graph, call: Call) -> None:
    """That the trace writes into the tensors that the module's own forward has written into.

    Raises:
        TraceError: It does not.
    """
    name = f"{type(call.module).__name__}.forward"
    traced = 0
    for node in graph.nodes:
        if READ_AGAIN in node.meta and isinstance(node.args[0].meta["val"], torch.Tensor):
            raise TraceError(f"{name} reads a tensor again that it has changed in place")
        traced += 0 if node.op == "call_module" else len(node.meta["writes"])
    if traced < len({s._cdata for s in call.own_writes}):
        raise TraceError(f"{name} changes a tensor in place in a way which a trace does not hold")


def _evaluate(node: fx.Node, module: nn.Module, values: dict[str, Any], known: dict[fx.Node, Any]) -> Any:
    """The value of a node that depends on the sizes of arguments and parameters alone.

    Raises:
        TraceError: It depends on what is in a tensor, or on a child.
    """
    if node not in known:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: _evaluate(n, module, values, known))
        if node.op == "placeholder":
            known[node] = values.get(str(node.target).lstrip("*"))
        elif node.op == "get_attr":
            tensors = {**module._parameters, **module._buffers}  # not through fx, which is tracing
            if node.target not in tensors:
                raise TraceError("it branches on what its children hold")
            known[node] = tensors[str(node.target)]
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
    if child is None or child.module is not target or not alike((args, kwargs), (child.args, child.kwargs)):
        raise _another_path(call)
    return child


def _no_more(call: Call, children: Iterator[Call]) -> None:
    if next(children, None) is not None:
        raise _another_path(call)


def _another_path(call: Call) -> TraceError:
    return TraceError(f"{type(call.module).__name__}.forward took another path when traced")


def _bind(call: Call) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a call's arguments into constants and tensors, both by parameter name."""
    signature = signature_of(type(call.module).forward)
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
