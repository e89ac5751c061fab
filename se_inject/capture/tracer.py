"""fx's tracer, made quick where many short forwards are traced one after another.

For each trace fx patches `nn.Module`, which clears Python's method caches of all subclasses, makes a wrapper for each
function that becomes a node, and reads the bytecode of each caller that unpacks a value. That is most of the time of a
short trace. Here it is done once for many traces.
"""

from __future__ import annotations

import bisect
import builtins
import contextlib
import dis
import functools
import inspect
import logging
import math
import operator
import sys
import threading
import types
import typing
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.fx.proxy import Attribute
from torch.utils._pytree import tree_leaves

from ..private import (
    WITH_MESSAGE,
    as_one_node,
    constant_types,
    fx_is_tracing,
    module_call,
    module_getattr,
    names_to_wrap,
    set_fx_tracing,
)
from ..undo import entered, surgery_lock, undone
from .author_code import draws_by_name, is_ours, names_in, own_call

_MISSING = object()
READ_AGAIN = "read again"  # in the meta of an ``x + y`` that the author wrote as ``x += y``
IN_PLACE: dict[Any, Any] = {
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
    operator.itruediv: operator.truediv, operator.ifloordiv: operator.floordiv, operator.imod: operator.mod,
    operator.ipow: operator.pow, operator.iand: operator.and_, operator.ior: operator.or_, operator.ixor: operator.xor,
    operator.ilshift: operator.lshift, operator.irshift: operator.rshift,
}  # fmt: skip
_TEXT = "Proxy("  # begins the text of a proxy
_PLAIN = {type(None), bool, int, float, str}
_SAMPLE = torch.empty(0)
_CONTAINERS = (list, tuple, dict, set)


class QuickTracer(fx.Tracer):
    """An `fx.Tracer` for modules that gives the same graphs in less time; traces inside one `patched` share its cost."""

    def __init__(self) -> None:
        from timm.models import get_notrace_functions

        super().__init__(autowrap_functions=tuple(get_notrace_functions()))
        self.refused: str | None = None
        self.reading = False
        self.sets_attributes = False
        self.drawing = False  # whether what draws random numbers is a node, so that they are drawn again at each call
        self.tensors: set[fx.Node] = set()  # arguments that are tensors
        self.texts = 0  # made of traced values

    def refusal(self, reason: str) -> TypeError:
        """The error to raise where a trace would be wrong; `refused` keeps the reason, as traced code may catch the error."""
        self.refused = self.refused or reason
        return TypeError(reason)

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        was_tracing = fx_is_tracing()
        with undone(lambda: set_fx_tracing(was_tracing)):
            set_fx_tracing(True)
            self.root = root
            self.root_module_name = root._get_name()
            self.submodule_paths = {m: name for name, m in root.named_modules()}
            self.graph = fx.Graph(tracer_cls=type(self))
            self.__dict__.pop("tensor_attrs", None)
            forward: Any = type(root).forward
            if not isinstance(forward, types.FunctionType):
                raise AssertionError(f"Expected FunctionType, got {type(forward)}")
            namespace = forward.__globals__
            returns = inspect.get_annotations(inspect.unwrap(forward)).get("return")
            forward, args = self.create_args_for_root(forward, True, concrete_args)
            with patched() as patches, patches.tracing(self):
                patches.wrap_in(namespace)
                self.create_node("output", "output", (self.create_arg(forward(*args)),), {}, type_expr=returns)
            for node in self.graph.nodes:
                if not _can_be_written(node.type):
                    node.type = None
                if node.op == "placeholder" and node.args and isinstance(node.args[0], float):
                    node.args = (float(node.args[0]),)
            if self.texts:  # but for those of messages
                self.texts -= sum(str(n.args[1:]).count(_TEXT) for n in self.graph.nodes if n.target in WITH_MESSAGE)
            _where_read_again(self.graph)
            self.submodule_paths = None
        return self.graph

    @functools.cached_property
    def tensor_attrs(self) -> dict[Any, str]:  # type: ignore[override]
        """The names of tensors that are plain attributes; made when a forward first reads one."""
        return {
            value: f"{path}.{key}" if path else key for path, m in self.root.named_modules(remove_duplicate=False)
            for key, value in m.__dict__.items() if isinstance(value, constant_types)}

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if type(a) in _PLAIN:
            return a
        if isinstance(a, float):  # numpy's, which is written as code that needs numpy
            return float(a)
        if type(a) is OrderedDict:  # of which fx makes a dict
            return self.create_node("call_function", OrderedDict, (self.create_arg(list(a.items())),), {})
        return a.node if isinstance(a, fx.Proxy) else super().create_arg(a)

    def sample(self, value: Any, classes: Any) -> Any:
        """For a proxy, an object of the class of the traced value, which is to be asked for `classes`; any other value itself.

        A computed value passes for no container, which the recorded run confirms.
        """
        if not isinstance(value, fx.Proxy):
            return value
        asked = classes if isinstance(classes, tuple) else (classes,)
        if value.node in self.tensors or all(isinstance(c, type) and issubclass(c, _CONTAINERS) for c in asked):
            return _SAMPLE
        raise self.refusal("it asks for the class of a value that it has computed")

    def wraps(self, function: Any) -> bool:
        """Whether a function in a Python module's namespace becomes one node."""
        return callable(function) and (id(function) in self._autowrap_function_ids or (self.drawing and samples(function)))


def _can_be_written(annotation: Any) -> bool:
    """Whether fx writes an annotation as code that means the same."""
    origin = typing.get_origin(annotation)
    if origin is None:
        return isinstance(annotation, (type, str, types.NoneType)) or annotation in (Any, Ellipsis)
    return origin in (typing.Union, types.UnionType, list, tuple, dict) and all(
        map(_can_be_written, typing.get_args(annotation)))


def _where_read_again(graph: fx.Graph) -> None:
    """Where a value is read again after ``x += y``, write ``x + y``, as fx does, and mark the node.

    The author's ``x += y`` does not change a number, but the code that fx prints would. Where `x` is a tensor,
    `own_forward` refuses.
    """
    changes = [n for n in graph.nodes if n.op == "call_function" and n.target in IN_PLACE and isinstance(n.args[0], fx.Node)]
    index = {node: i for i, node in enumerate(graph.nodes)} if changes else {}
    for node in changes:
        if any(index[user] > index[node] for user in node.args[0].users):
            node.target = IN_PLACE[node.target]
            node.meta[READ_AGAIN] = True


class _Quick:
    """A proxy that looks the unpacking up in an index of its caller's bytecode, and tells ``+=`` from ``+``."""

    def __iter__(self: Any) -> Iterator[Any]:
        caller = sys._getframe(1)
        offsets, lengths = _unpackings(caller.f_code)
        length = lengths[bisect.bisect_left(offsets, caller.f_lasti)]
        items: Iterator[Any] = self.tracer.iter(self) if length is None else (self[i] for i in range(length))
        return items

    def __getattr__(self: Any, k: str) -> Any:
        return _Attribute(self, k)

    def __hash__(self: Any) -> int:
        if not is_ours(sys._getframe(1)):
            raise self.tracer.refusal("it looks a traced value up in a table, or keeps it")
        return id(self)

    def __setattr__(self: Any, k: str, value: Any) -> None:
        if not is_ours(sys._getframe(1)):
            raise self.tracer.refusal(f"it sets an attribute of a traced value, {k}")
        object.__setattr__(self, k, value)

    def __repr__(self: Any) -> str:
        if not is_ours(sys._getframe(1)):
            self.tracer.texts += 1
        return f"{_TEXT}{self.node.name})"

    def __deepcopy__(self: Any, memo: Any) -> Any:
        raise self.tracer.refusal("it makes a deep copy of a traced value")

    def __int__(self: Any) -> int:
        raise self.tracer.refusal("it makes a plain number of a traced value")

    __index__ = __int__

    def __float__(self: Any) -> float:
        raise self.tracer.refusal("it makes a plain number of a traced value")


def _in_place(target: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    def change(self: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", target, (self, other), {}, name=plain.__name__)

    return change


for _target, _plain in IN_PLACE.items():
    setattr(_Quick, f"__{_target.__name__}__", _in_place(_target, _plain))


class _Proxy(_Quick, fx.Proxy):
    pass


class _Attribute(_Quick, Attribute):
    pass


@functools.lru_cache(maxsize=4096)
def _unpackings(code: types.CodeType) -> tuple[list[int], list[int | None]]:
    """The offsets of a code's instructions, and for each the number of names that it unpacks to, or None."""
    found = [(i.offset, i.argval if i.opname == "UNPACK_SEQUENCE" else None) for i in dis.get_instructions(code)]
    return [offset for offset, _ in found], [length for _, length in found]


class _Patches:
    """What is patched while modules are traced.

    Wrappers of functions are kept, and put in again for each trace, as they depend on the modules that it passes.
    """

    def __init__(self) -> None:
        self.tracer: QuickTracer | None = None
        self._parameters: dict[str, fx.Proxy] = {}
        self._visited: set[int] = set()
        self._replaced: list[tuple[dict[str, Any], str, Any]] = []
        self._found: dict[tuple[int, bool], tuple[dict[str, Any], list[tuple[str, Any]]]] = {}
        self._wrappers: dict[Any, Callable[..., Any]] = {}

    @contextlib.contextmanager
    def tracing(self, tracer: QuickTracer) -> Iterator[None]:
        """Inside, calls of modules go to `tracer`, and the functions that fx wraps are wrapped."""
        outer = self.tracer, self._parameters, self._visited, self._replaced
        replaced: list[tuple[dict[str, Any], str, Any]] = []
        kinds: set[Any] = set(map(type, tracer.submodule_paths or ()))
        calling = [(owner, owner.__dict__["__call__"]) for owner in {owner for kind in kinds for owner in own_call(kind)}]

        def put_back() -> None:
            for owner, original in calling:
                owner.__call__ = original
            for namespace, name, was in reversed(replaced):
                if was is _MISSING:
                    namespace.pop(name, None)
                else:
                    namespace[name] = was
            self.tracer, self._parameters, self._visited, self._replaced = outer

        with undone(put_back):
            self.tracer, self._parameters, self._visited, self._replaced = tracer, {}, set(), replaced
            for owner, original in calling:
                owner.__call__ = self._leaf(original)
            for namespace, name in names_to_wrap():
                self._put(namespace, name, namespace[name] if name in namespace else getattr(builtins, name))
            self.wrap_in(math.__dict__)
            yield

    def _leaf(self, original: Any) -> Any:
        """A `__call__` of an author's own, as a leaf like others: the generated forward will call it whole."""
        thread = threading.get_ident()

        @functools.wraps(original)
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self.tracer is None or threading.get_ident() != thread:
                return original(module, *args, **kwargs)
            return self.tracer.call_module(module, functools.partial(original, module), args, kwargs)

        return call

    def wrap_in(self, namespace: dict[str, Any]) -> None:
        """Wrap the functions in a module's namespace that become one node; let `isinstance` and `len` there know proxies."""
        tracer, key = self.tracer, id(namespace)
        if tracer is None or key in self._visited:
            return
        self._visited.add(key)
        if not str(namespace.get("__name__")).startswith(("torch.", "math")):
            for name, answer in (("isinstance", self._is_instance), ("len", self._length)):
                if name not in namespace:
                    self._replaced.append((namespace, name, _MISSING))
                    namespace[name] = answer
        found = key, tracer.drawing
        if found not in self._found:  # held, so that no other gets its address
            self._found[found] = namespace, [
                (name, f) for name, f in namespace.items() if (tracer.drawing or not name.startswith("_")) and tracer.wraps(f)]
        for name, f in self._found[found][1]:
            self._put(namespace, name, f)

    def _put(self, namespace: dict[str, Any], name: str, function: Any) -> None:
        if function not in self._wrappers:
            self._wrappers[function] = as_one_node(function)
        self._replaced.append((namespace, name, namespace.get(name, _MISSING)))
        namespace[name] = self._wrappers[function]

    def _is_instance(self, value: Any, classes: Any) -> bool:
        """`isinstance` for the author's code: of a proxy it asks for the class of the traced value."""
        return isinstance(value if self.tracer is None else self.tracer.sample(value, classes), classes)

    def _length(self, value: Any) -> Any:
        """`len` for the author's code: of a proxy, a node, as a size is. A list of proxies has a length of its own."""
        if self.tracer is None or not isinstance(value, fx.Proxy):
            return len(value)
        return self.tracer.create_proxy("call_function", len, (value,), {})

    def attribute(self, name: str, value: Any) -> Any:
        return value if self.tracer is None else self.tracer.getattr(name, value, self._parameters)


# what is patched for a trace, with the reason for which it ends there; the methods of `nn.Module` go on
_PATCHED: dict[tuple[Any, str], str] = {
    (nn.Module, "__getattr__"): "", (nn.Module, "__call__"): "", (nn.Module, "__setattr__"): "",
    (builtins, "print"): "it prints",
    (warnings, "warn"): "it warns",
    (nn.Module, "requires_grad_"): "it sets what is trained",
    (torch.Tensor, "requires_grad_"): "it sets what is trained",
    (logging.Logger, "handle"): "it writes to a log",
    (torch, "is_inference_mode_enabled"): "it asks for the inference mode",
    (torch, "is_tensor"): "",
    (torch.autograd.graph.saved_tensors_hooks, "__enter__"): (
        "it checkpoints a part of itself, or changes what autograd saves, which a trace does not hold: turn its gradient "
        "checkpointing off"),
    **{(holder, name): "it seeds the random numbers"
       for holder in (torch, torch.random) for name in ("manual_seed", "seed", "set_rng_state")},
}
_open: _Patches | None = None

# functions that make a tensor of a size, which fx does not see in them: random ones, and others
_RANDOM = (torch.rand, torch.randn, torch.randint, torch.randperm)
_MADE = (torch.empty, torch.zeros, torch.ones, torch.full)

def samples(function: object) -> bool:
    """Whether it is a function in Python, none of torch's, that draws random numbers, as a functional drop path does."""
    return isinstance(function, types.FunctionType) and _samples(function)


@functools.lru_cache(maxsize=4096)
def _samples(function: types.FunctionType, depth: int = 3) -> bool:
    if str(function.__module__).startswith(("torch.", "se_inject.")):
        return False
    names = names_in(function)
    called = [function.__globals__.get(name) for name in names if depth]
    return any(map(draws_by_name, names)) or any(isinstance(f, types.FunctionType) and _samples(f, depth - 1) for f in called)


@contextlib.contextmanager
def patched() -> Iterator[_Patches]:
    """Inside, `nn.Module` is patched for all traces of this thread; nested calls share the patches.

    Another thread that traces waits; one that runs a model does not see the patches.
    """
    with entered(surgery_lock):
        if _open is not None:
            yield _open
        else:
            with _patched() as patches:
                yield patches


@contextlib.contextmanager
def _patched() -> Iterator[_Patches]:
    global _open
    patches = _Patches()
    module: Any = nn.Module
    thread = threading.get_ident()
    was = [(holder, name, getattr(holder, name)) for holder, name in _PATCHED]
    inherited = {(holder, name) for holder, name in _PATCHED if isinstance(holder, type) and name not in vars(holder)}

    @functools.wraps(module_getattr)
    def get(self: nn.Module, name: str) -> Any:
        value = module_getattr(self, name)
        return value if threading.get_ident() != thread else patches.attribute(name, value)

    @functools.wraps(module_call)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if patches.tracer is None or threading.get_ident() != thread:
            return module_call(self, *args, **kwargs)
        patches.wrap_in(getattr(getattr(self, "forward", self), "__globals__", {}))
        return patches.tracer.call_module(self, functools.partial(module_call, self), args, kwargs)

    def is_tensor(obj: Any) -> bool:
        return isinstance(obj if patches.tracer is None else patches.tracer.sample(obj, torch.Tensor), torch.Tensor)

    def refusing(original: Callable[..., Any], reason: str) -> Callable[..., Any]:
        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            tracer = patches.tracer
            if tracer is not None and not tracer.reading and threading.get_ident() == thread and (
                    not is_ours(sys._getframe(1))):
                if reason:
                    raise tracer.refusal(reason)
                tracer.sets_attributes = True
            return original(*args, **kwargs)

        return wrapper

    def making(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            tracer = patches.tracer
            if tracer is None or not tracer.drawing or threading.get_ident() != thread or is_ours(sys._getframe(1)):
                return original(*args, **kwargs)
            if original in _RANDOM or any(isinstance(a, fx.Proxy) for a in tree_leaves((args, kwargs))):
                return tracer.create_proxy("call_function", original, args, kwargs)
            return original(*args, **kwargs)

        return wrapper

    made = [(f.__name__, f) for f in (*_RANDOM, *_MADE)]

    def put_back() -> None:
        global _open
        _open = None
        for holder, name, original in was:
            if (holder, name) not in inherited:
                setattr(holder, name, original)
            elif name in vars(holder):
                delattr(holder, name)
        for name, original in made:
            setattr(torch, name, original)

    with undone(put_back):
        for holder, name, original in was:
            setattr(holder, name, refusing(original, _PATCHED[holder, name]))
        for name, original in made:
            setattr(torch, name, making(original))
        module.__getattr__, module.__call__ = get, call
        setattr(torch, "is_tensor", is_tensor)  # noqa: B010 (mypy knows another type)
        _open = patches
        yield patches
