"""The class of a module whose forward was optimised for inference, and its pickling."""

from __future__ import annotations

import importlib
import itertools
import linecache
from types import ModuleType
from typing import Any

from torch import fx, nn

from .edits import base_class
from .errors import SEInjectError
from .rewrite import derived, guarded, sequential_class
from .sequential import MEMBERS

_classes: dict[tuple[Any, ...], type[nn.Module]] = {}
_numbers = itertools.count(1)


def optimised_class(module: nn.Module, graph: fx.Graph, fixed: dict[str, Any]) -> type[nn.Module]:
    """A subclass of `module`'s class with `graph` for its forward, for calls with the arguments that are `fixed`.

    Modules of one class and equal code share one. `module` is not changed.
    """
    graph.lint()
    code = graph.python_code("self")
    base = base_class(module)
    source, names = guarded(code.src, fixed, f"{base.__name__}.forward was optimised for one value of {{name}}: "
                            "optimise the model in the way it is called")
    counts = isinstance(module, nn.Sequential) and "_se_edits" in module.__dict__
    return _class_of(base, source, {**code.globals, **names}, counts)


def _class_of(base: type[nn.Module], source: str, names: dict[str, Any], counts: bool) -> type[nn.Module]:
    """`counts` says that the class is a Sequential's with blocks among its children."""
    key = (base, source, counts, tuple(sorted((k, id(v)) for k, v in names.items())))
    if key not in _classes:
        filename = f"<se_inject optimised {base.__name__} {next(_numbers)}>"
        linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
        namespace = dict(names)
        exec(compile(source, filename, "exec"), namespace)
        members = {**(MEMBERS if counts else {}), **({"__getitem__": _getitem} if issubclass(base, nn.Sequential) else {})}
        _classes[key] = derived(base, {
            **members, "forward": namespace["forward"], "__reduce_ex__": _reduce, "_se_code": (source, names, counts)})
    return _classes[key]


def become(module: nn.Module, cls: type[nn.Module]) -> None:
    """Make `module` one of its `optimised_class`, in place. Its edits go; a Sequential's stay, as they say which of its
    children are blocks."""
    if not cls._se_code[2]:  # type: ignore[attr-defined]
        module.__dict__.pop("_se_edits", None)
    module.__class__ = cls


def _getitem(self: nn.Module, idx: Any) -> Any:
    """Of a Sequential: its parts are those that it had before, as the new forward is that of the whole."""
    cls: Any = type(self)
    base = sequential_class(cls._se_base) if cls._se_code[2] else cls._se_base
    before = base.__new__(base)
    before.__dict__.update(self.__dict__)
    return before[idx]


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """Pickle by the original class and the code: a class made at run time has no name to import."""
    cls: Any = type(self)
    source, names, counts = cls._se_code
    given = {k: (v.__name__, None) if isinstance(v, ModuleType) else (None, v) for k, v in names.items()}
    return _new, (cls._se_base, source, given, counts), self.__getstate__(), None, None, _set_state


def _new(base: type[nn.Module], source: str, given: dict[str, tuple[str | None, Any]], counts: bool) -> nn.Module:
    names = {k: v if module is None else importlib.import_module(module) for k, (module, v) in given.items()}
    cls = _class_of(base, source, names, counts)
    return cls.__new__(cls)


def _set_state(module: nn.Module, state: dict[str, Any]) -> None:
    module.__setstate__(dict(state))


def refuse_optimised(model: nn.Module, what: str) -> None:
    """
    Raises:
        SEInjectError: The model came out of `optimize_for_inference`.
    """
    if any("se_report" in m.__dict__ or "_se_code" in type(m).__dict__ for m in model.modules()):
        raise SEInjectError(
            f"{what}: this model was optimised for inference, and its weights are no longer those of its architecture; "
            "use the model that it was made from")
