"""timm's door: ``timm.create_model("se_inject/<name>[.tag]", se_<option>=...)``.

timm looks up its entry points in one table. Here, a table that has a twin for every name replaces it, and timm's parser of
model names learns the prefix. A name that is registered later gets its twin, too.
"""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

from .config import SEConfig
from .errors import SEInjectError, TraceError
from .private import deprecated_names, entrypoints, feature_getter, missing_in_timm, register_twin, replace_in_timm
from .timm_names import ALIAS, PREFIX, base_name, door_options, model_args, remember_args, rename, split_options
from .undo import entered, import_lock, undone

_MODULE = "se_inject"
_pending: contextvars.ContextVar[_Pending | None] = contextvars.ContextVar("se_inject_pending", default=None)


@dataclasses.dataclass(eq=False)
class _Pending:
    """Injections that wait until timm has built the model."""

    configs: tuple[SEConfig, ...]
    done: bool = False

    def inject(self, model: Any) -> None:
        with entered(import_lock):
            from .surgery.pipeline import inject

        for config in self.configs:
            inject(model, config)
        self.done = True


class TwinEntrypoints(dict[str, Callable[..., Any]]):
    """timm's entry points, each with its twins ``se_inject/<name>`` and ``se_inject_<name>``.

    timm fills its tables of tags after this table, so that twins are added when the table is read. The alias without a
    slash can be used, but is not listed.
    """

    def __init__(self, table: dict[str, Callable[..., Any]]) -> None:
        super().__init__(table)
        self._deprecated = deprecated_names()
        self._lock = threading.RLock()
        self._waiting = [n for n in table if n not in self._deprecated]
        for name in self._waiting:
            for twin in (PREFIX + name, ALIAS + name):
                if twin in table:
                    raise SEInjectError(
                        f"timm already has a model named {twin!r}, and se_inject needs this name for the twin of {name!r}: "
                        "register that model under another name")

    def __setitem__(self, name: str, fn: Callable[..., Any]) -> None:
        if name.startswith((PREFIX, ALIAS)):
            raise SEInjectError(
                f"the model name {name!r} belongs to se_inject, which derives it from {base_name(name)!r}: "
                "register the model under a name without that prefix")
        super().__setitem__(name, fn)
        self._waiting.append(name)

    def __getitem__(self, name: str) -> Callable[..., Any]:
        self._flush()
        if name.startswith(ALIAS) and not super().__contains__(name):
            name = PREFIX + base_name(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default  # noqa: SIM401 (this is the get that it asks for)

    def __contains__(self, name: object) -> bool:
        self._flush()
        if isinstance(name, str) and name.startswith(ALIAS):
            name = PREFIX + base_name(name)
        return super().__contains__(name)

    def __iter__(self) -> Iterator[str]:
        self._flush()
        return super().__iter__()

    def __len__(self) -> int:
        self._flush()
        return super().__len__()

    def keys(self) -> Any:
        self._flush()
        return super().keys()

    def _flush(self) -> None:
        """Add the twins of the names that wait. A name waits until its twin is whole: other threads wait for it, too."""
        if not self._waiting:
            return
        with entered(self._lock):
            while self._waiting:
                name = self._waiting[-1]
                if name not in self._deprecated:
                    super().__setitem__(PREFIX + name, _twin_entrypoint(name))
                    register_twin(name, PREFIX, _MODULE)
                self._waiting.remove(name)


def _twin_entrypoint(name: str) -> Callable[..., Any]:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> Any:
        return create(name, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = PREFIX + name
    return entrypoint


def create(name: str, pretrained: bool = False, **kwargs: Any) -> Any:
    """Build the timm model `name` with blocks. timm calls this with all arguments of `timm.create_model`.

    Pretrained weights are those of the base, for the tag. They are loaded after the injection, so that a file with blocks
    loads through the same code.
    """
    configs, rest = split_options(kwargs)
    pending = _Pending(configs)
    outer = _pending.get()
    with undone(lambda: _pending.set(outer)):
        _pending.set(pending)
        model = entrypoints()[name](pretrained=pretrained, **rest)
    if not pending.done:
        try:
            pending.inject(model)
        except TraceError:  # the feature getter may need values in its forward, while the model inside it does not
            if not isinstance(model, feature_getter()):
                raise
            pending.inject(model.model)
    rename(model, injected=True)  # here, because `inject` may have seen the model inside a feature wrapper
    return remember_args(model, kwargs)


def _inject_before(load_pretrained: Callable[..., Any]) -> Callable[..., Any]:
    """timm's loading of pretrained weights, after the injection. The family's filter does not see the blocks' tensors."""
    signature = inspect.signature(load_pretrained)

    @functools.wraps(load_pretrained)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        from .surgery.state import injections_of
        from .weights.strict import around_blocks

        call = signature.bind(*args, **kwargs)
        model = call.arguments["model"]
        pending = _pending.get()
        if pending is not None and not pending.done:
            pending.inject(model)
        if injections_of(model):
            call.arguments["filter_fn"] = around_blocks(call.arguments.get("filter_fn"))
        return load_pretrained(*call.args, **call.kwargs)

    return wrapper


def _describe_twins(save_config: Callable[..., Any]) -> Callable[..., Any]:
    """timm's ``config.json``, with the options of the injections, whether timm's door or `inject` did them."""
    signature = inspect.signature(save_config)

    @functools.wraps(save_config)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        from .surgery.state import injections_of

        call = signature.bind(*args, **kwargs)
        model = call.arguments["model"]
        injections = injections_of(model)
        if not injections:
            return save_config(*args, **kwargs)
        ours = {**model_args(model), **door_options([i.written() for i in injections])}
        call.arguments["model_args"] = {**ours, **(call.arguments.get("model_args") or {})}
        given = getattr(model, "_model_args", {})
        with undone(lambda: model.__dict__.update(_model_args=given)):
            model.__dict__["_model_args"] = {k: v for k, v in given.items() if not k.startswith("se_")}
            return save_config(*call.args, **call.kwargs)

    return wrapper


def _parse_prefix(parse_model_name: Callable[[str], Any]) -> Callable[[str], Any]:
    @functools.wraps(parse_model_name)
    def wrapper(model_name: str) -> Any:
        if model_name.startswith(PREFIX):
            return None, model_name
        return parse_model_name(model_name)

    return wrapper


_WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "parse_model_name": _parse_prefix, "load_pretrained": _inject_before, "save_config_for_hf": _describe_twins}


def register() -> None:
    """Add the twins to timm. A second call changes nothing.

    Raises:
        SEInjectError: timm has a model with the name of a twin, or does not have a function that is wrapped here. timm is
            then unchanged.
    """
    table = entrypoints()
    if isinstance(table, TwinEntrypoints):
        return
    gone = missing_in_timm(_WRAPPERS)
    if gone:
        raise SEInjectError(
            f"this timm has no {gone[0]} for se_inject to wrap, and would build or save plain models "
            "for 'se_inject/...' names: use timm 1.0.15 to 1.0.31, or se_inject.inject(model)")
    replace_in_timm(TwinEntrypoints(table), _WRAPPERS)
