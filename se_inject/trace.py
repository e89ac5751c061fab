"""Trace the forward of one module, with its children as leaves, or say what in it a trace would lose."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import random
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint
from torch import fx, nn

from .errors import TraceError
from .record import untouched
from .tracer import QuickTracer


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


CHECKPOINTED = "checkpointed"  # in a node's meta: in which call of `torch.utils.checkpoint` the author's code computes it


def _packing() -> Callable[..., object] | None:
    """What autograd does now with each tensor that it saves; None is the usual."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return None if hooks is None else hooks[0]


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
    versions = tuple(
        t._version for d in (module._parameters, module._buffers) for t in d.values()
        if t is not None and not t.is_inference())
    modes = tuple(m.training for m in module.modules())
    return own, versions, modes, random.getstate()[1], torch.get_rng_state().numpy().tobytes()


class _OwnTracer(QuickTracer):
    """Traces one module; every child is a leaf, and arguments that are no tensors are constants.

    Where the forward branches on a value, `decide` says which way it goes.
    """

    def __init__(self, constants: dict[str, Any], decide: Callable[[fx.Node], bool] | None, reading: bool) -> None:
        super().__init__()
        self.proxy_buffer_attributes = reading
        self.constants = constants
        self.decide = decide
        self.decided: dict[Hashable, bool] = {}
        self.modes = _modes()
        self.packing = [_packing()]

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self.modes:
            raise TraceError("it changes the grad or autocast mode, which a trace does not hold")
        node = super().create_node(*args, **kwargs)
        packing = _packing()
        if packing is not self.packing[0]:
            if getattr(packing, "__module__", "") != torch.utils.checkpoint.__name__:
                raise TraceError("it changes what autograd saves, which a trace does not hold")
            if packing is not self.packing[-1]:
                self.packing.append(packing)
            node.meta[CHECKPOINTED] = len(self.packing)
        return node

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

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)  # every child is a leaf

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        fn, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        names = iter(signature_of(root_fn).parameters)
        next(names)  # self
        for i, name in enumerate(names, start=1):
            if name in self.constants and i < len(args):
                value = self.constants[name]
                args[i] = value.of(args[i]) if isinstance(value, Unpacked) else value
        return fn, args


@functools.lru_cache(maxsize=1024)
def signature_of(function: Any) -> inspect.Signature:
    return inspect.signature(function)


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
    module: nn.Module, constants: dict[str, Any], decide: Callable[[fx.Node], bool] | None = None, reading: bool = False
) -> fx.Graph:
    """Trace `module`'s own forward with its children as leaves. `module` is not changed.

    `decide` is asked, with the node of the condition, wherever the forward branches on a value. With `reading`
    no code will be made of the trace: the forward may set attributes, and what it computes of buffers is traced, too.

    Raises:
        TraceError: The forward does something that fx cannot follow.
    """
    if isinstance(module, fx.GraphModule):
        return copy_graph(module.graph)
    if is_plain_sequential(module):
        return _chain(module)
    kinds = [p.kind for p in signature_of(type(module).forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds and inspect.Parameter.KEYWORD_ONLY in kinds:
        raise TraceError(f"{type(module).__name__}.forward has keyword arguments behind *args, which fx mixes up")
    with untouched([module]), _other_modes():
        before = _state(module)
        try:
            graph = _OwnTracer(constants, decide, reading).trace(module)
        except Exception as error:  # fx raises what the traced code raises
            raise TraceError(f"{type(module).__name__}.forward cannot be traced: {error}") from error
        if not reading and _state(module) != before:
            raise TraceError(
                f"{type(module).__name__}.forward sets attributes or buffers of its module, or draws random numbers, "
                "which a trace does not hold")
    for node in graph.nodes:
        if node.op == "get_attr" and node.target.startswith("_tensor_constant"):
            raise TraceError(f"{type(module).__name__}.forward makes a tensor that the trace would freeze")
    return graph
