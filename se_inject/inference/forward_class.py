"""The class of a module whose forward was optimised for inference, and its pickling."""

from __future__ import annotations

import importlib
import itertools
import linecache
from types import ModuleType
from typing import Any

import torch
from torch import fx, nn

from ..dataflow.ops import is_tensor
from ..surgery.codegen import sequential_class
from ..surgery.generated_class import derived, guarded, with_guards
from ..surgery.sequential import MEMBERS
from ..surgery.state import base_class

_classes: dict[tuple[Any, ...], type[nn.Module]] = {}
_numbers = itertools.count(1)


def optimized_class(module: nn.Module, graph: fx.Graph, plain: fx.Graph, fixed: dict[str, Any]) -> type[nn.Module]:
    """A subclass of `module`'s class with `graph` for its forward, for calls with the arguments that are `fixed`.

    Where `wants_plain` says so, the forward is that of `plain`. Modules of one class and equal code share a class. `module`
    is not changed.
    """
    graph.lint()
    code, author = graph.python_code("self"), plain.python_code("self")
    base = base_class(module)
    source, names = guarded(code.src, fixed, f"{base.__name__}.forward was optimised for one value of {{name}}: "
                            "optimise the model in the way it is called")
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    first = next((str(n.target) for n in inputs if is_tensor(n)), None)
    if first is not None:
        given = ", ".join(f"{n.target}={n.target}" for n in inputs)
        source = with_guards(source, f"    if wants_plain({first}):\n        return self._se_plain({given})\n")
    counts = isinstance(module, nn.Sequential) and "_se_edits" in module.__dict__
    return _class_of(base, {
        "forward": (source, {**code.globals, **names, "wants_plain": wants_plain}),
        "_se_plain": (author.src.replace("def forward(", "def _se_plain(", 1), author.globals)}, counts)


def wants_plain(x: torch.Tensor) -> bool:
    """Whether a forward is to be computed as it was: where a gradient is asked for, which what is done in place has not, and
    under autocast, in which operands in one memory may be of different types."""
    if torch.jit.is_scripting():  # what is behind it is not compiled
        return False
    else:
        return not isinstance(x, fx.Proxy) and (
            (x.requires_grad and torch.is_grad_enabled()) or (not x.is_meta and torch.is_autocast_enabled(x.device.type)))


def _class_of(base: type[nn.Module], methods: dict[str, tuple[str, dict[str, Any]]], counts: bool) -> type[nn.Module]:
    """`methods` are sources, with the names that they use; `counts` says that the class is a Sequential's with blocks among
    its children."""
    key = (base, counts, *((source, *sorted((k, id(v)) for k, v in names.items())) for source, names in methods.values()))
    if key not in _classes:
        members: dict[str, Any] = dict(MEMBERS) if counts else {}
        if issubclass(base, nn.Sequential):
            members["__getitem__"] = _getitem
        for name, (source, names) in methods.items():
            filename = f"<se_inject optimised {base.__name__} {next(_numbers)}>"
            linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
            namespace = dict(names)
            exec(compile(source, filename, "exec"), namespace)
            members[name] = namespace[name]
        _classes[key] = derived(base, {**members, "__reduce_ex__": _reduce, "_se_code": (methods, counts)})
    return _classes[key]


def become(module: nn.Module, cls: type[nn.Module]) -> None:
    """Make `module` one of its `optimised_class`, in place. Its edits go; a Sequential's stay, as they say which of its
    children are blocks."""
    if not cls._se_code[1]:  # type: ignore[attr-defined]
        module.__dict__.pop("_se_edits", None)
    module.__class__ = cls


def _getitem(self: nn.Module, idx: Any) -> Any:
    """Of a Sequential: its parts are those that it had before, as the new forward is that of the whole."""
    cls: Any = type(self)
    base = sequential_class(cls._se_base) if cls._se_code[1] else cls._se_base
    before = base.__new__(base)
    before.__dict__.update(self.__dict__)
    return before[idx]


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """Pickle by the original class and the code: a class made at run time has no name to import."""
    cls: Any = type(self)
    methods, counts = cls._se_code
    given = {name: (source, {k: (v.__name__, None) if isinstance(v, ModuleType) else (None, v) for k, v in names.items()})
             for name, (source, names) in methods.items()}
    return _new, (cls._se_base, given, counts), self.__getstate__(), None, None, _set_state


def _new(base: type[nn.Module], given: dict[str, tuple[str, dict[str, Any]]], counts: bool) -> nn.Module:
    cls = _class_of(base, {
        name: (source, {k: v if module is None else importlib.import_module(module) for k, (module, v) in names.items()})
        for name, (source, names) in given.items()}, counts)
    return cls.__new__(cls)


def _set_state(module: nn.Module, state: dict[str, Any]) -> None:
    module.__setstate__(dict(state))
