"""The class of a module with an optimized forward, and its pickling."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import fx, nn

from ..capture.snapshot import set_class
from ..surgery.generated_class import Code, generated, guards_for, new_of, with_guards
from ..surgery.sequential import MEMBERS, sequential_class
from ..surgery.state import OPTIMIZED, base_class, edits_of, set_edits
from .programs import wants_plain


def optimized_class(
    module: nn.Module, graph: fx.Graph, plain: fx.Graph, fixed: dict[str, Any], given: tuple[str, ...]
) -> type[nn.Module]:
    """A subclass of `module`'s class with another forward. `module` is not changed.

    Modules with one class and equal code share the subclass.

    Args:
        module: The module.
        graph: The optimized forward.
        plain: The author's forward, for inputs for which `wants_plain` says so.
        fixed: The arguments whose values both graphs hold; a call with another value raises.
        given: The arguments that are None by default and tensors in both graphs; a call without one raises.
    """
    graph.lint()
    code, author = graph.python_code("self"), plain.python_code("self")
    base = base_class(module)
    guards, names = guards_for(
        fixed, given, f"{base.__name__}.forward was optimized for one value of {{name}}: optimize the model as it is called")
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    asked = [f"wants_plain({name})" for n in inputs for name in _tensors_in(str(n.target).lstrip("*"), n.meta["val"])]
    if asked:
        arguments = ", ".join(f"{n.target}={n.target}" for n in inputs)
        guards += f"    if {' or '.join(asked)}:\n        return self._se_plain({arguments})\n"
    used = {**code.globals, **(names if fixed or given else {}), "wants_plain": wants_plain}
    sources = [(with_guards(code.src, guards), used), (author.src.replace("def forward(", "def _se_plain(", 1), author.globals)]
    return _class_of(base, sources, isinstance(module, nn.Sequential) and edits_of(module) is not None)


def _tensors_in(name: str, value: Any) -> Iterator[str]:
    """The tensors in an argument of this value, as code."""
    if isinstance(value, torch.Tensor):
        yield name
    elif isinstance(value, (list, tuple, dict)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors_in(f"{name}[{key!r}]", item)


def folded_class(module: nn.Module, graph: fx.Graph) -> type[nn.Module]:
    """A subclass of a folded norm's class whose forward is this graph, for all inputs. `module` is not changed."""
    graph.lint()
    code = graph.python_code("self")
    printed: Code = "def extra_repr(self):\n    return 'folded'\n", {}
    return _class_of(base_class(module), [(code.src, code.globals), printed], has_blocks=False)


def _class_of(base: type[nn.Module], sources: Sequence[Code], has_blocks: bool) -> type[nn.Module]:
    """`has_blocks`: `base` is a Sequential's class, and there are blocks among the children, without positions."""
    members: dict[str, Any] = dict(MEMBERS) if has_blocks else {}
    if issubclass(base, nn.Sequential):
        members["__getitem__"] = _getitem
    members |= {"__reduce_ex__": _reduce, OPTIMIZED: (sources, has_blocks)}
    return generated(base, sources, members, ("optimized", has_blocks))


def become(module: nn.Module, cls: type[nn.Module]) -> None:
    """Give `module` its `optimized_class`, in place.

    Its edits are dropped, as the new forward holds them; a Sequential keeps its edits, which say which children are blocks.
    """
    if not getattr(cls, OPTIMIZED)[1]:  # type: ignore[attr-defined]
        set_edits(module, None)
    set_class(module, cls)


def _getitem(self: nn.Module, idx: Any) -> Any:
    """A part of a Sequential has the class that it had before: the optimized forward is that of the whole."""
    cls: Any = type(self)
    base = sequential_class(base_class(self)) if getattr(cls, OPTIMIZED)[1] else base_class(self)
    before: Any = base.__new__(base)
    before.__dict__.update(self.__dict__)
    return before[idx]


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """Pickle the base class and the code: a class made at run time has no name to import."""
    cls: Any = type(self)
    sources, has_blocks = getattr(cls, OPTIMIZED)
    given = [(text, {k: (v.__name__, None) if isinstance(v, ModuleType) else (None, v) for k, v in names.items()})
             for text, names in sources]
    return _new, (base_class(self), given, has_blocks), self.__getstate__(), None, None, _set_state


def _new(base: type[nn.Module], given: list[tuple[str, dict[str, Any]]], has_blocks: bool) -> nn.Module:
    return new_of(_class_of(base, [
        (text, {k: v if module is None else importlib.import_module(module) for k, (module, v) in names.items()})
        for text, names in given], has_blocks))


def _set_state(module: nn.Module, state: dict[str, Any]) -> None:
    module.__setstate__(dict(state))
