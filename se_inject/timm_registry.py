"""timm's door: ``timm.create_model("se_inject/<name>[.tag]", se_<option>=...)``.

timm looks up models by name in tables. Here, tables that have a twin for every name replace them, and timm's parser of model
names learns the prefix. A name that is registered later has its twin, too.
"""

from __future__ import annotations

import collections
import contextvars
import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

from .config import SEConfig
from .errors import SEInjectError, TraceError
from .private import entrypoints, feature_getter, missing_in_timm, registry, replace_in_timm
from .timm_names import ALIAS, PREFIX, base_name, door_options, model_args, remember_args, rename, split_options
from .timm_tables import (
    MODULE,
    TwinEntrypoints,
    TwinSet,
    TwinsOf,
    TwinTable,
    cfg_of_twin,
    listing_aliases,
    tags_of_twin,
)
from .undo import entered, import_lock, undone

_pending: contextvars.ContextVar[_Pending | None] = contextvars.ContextVar("se_inject_pending", default=None)


@dataclasses.dataclass(eq=False)
class _Pending:
    """Injections that wait until timm has built the model of this name."""

    name: str
    configs: tuple[SEConfig, ...]
    injected: Any = None

    def waits_for(self, pretrained_cfg: Any) -> bool:
        """Whether the injection comes after these weights.

        They may be those of attention that blocks replace, or of another model, which is one part of this one.
        """
        name = str((pretrained_cfg or {}).get("architecture") or self.name)
        return not name.startswith(PREFIX) and (
            name != self.name or any(config.existing == "replace" for config in self.configs))

    def inject(self, model: Any) -> None:
        with entered(import_lock):
            from .surgery.pipeline import inject

        for config in self.configs:
            inject(model, config)
        self.injected = model


@functools.cache
def _entrypoint_of(base: str) -> Callable[..., Any]:
    """The entry point of a twin: the same function by name and by alias, whatever timm's entry point of the base is then."""

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> Any:
        return create(base, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = PREFIX + base
    return entrypoint


def create(name: str, pretrained: bool = False, **kwargs: Any) -> Any:
    """Build the timm model `name` with blocks. timm calls this with all arguments of `timm.create_model`.

    Pretrained weights are those of the base, for the tag. They are loaded after the injection, so that a file with blocks
    loads through the same code; but before it where blocks replace attention that has such weights.
    """
    configs, rest = split_options(kwargs)
    pending = _Pending(name, configs)
    outer = _pending.get()
    with undone(lambda: _pending.set(outer)):
        _pending.set(pending)
        model = entrypoints()[name](pretrained=pretrained, **rest)
    if pending.injected is not None:
        if not any(m is pending.injected for m in model.modules()):  # but its modules are
            from .surgery.pipeline import adopt

            adopt(model, pending.injected)
    else:
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
        if pending is not None and pending.injected is None and not pending.waits_for(call.arguments.get("pretrained_cfg")):
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


def _list_aliases(list_models: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """timm's listing, with the aliases where a filter begins with their prefix. `list_pretrained` calls it."""
    signature = inspect.signature(list_models)

    @functools.wraps(list_models)
    def wrapper(*args: Any, **kwargs: Any) -> list[str]:
        call = signature.bind(*args, **kwargs)
        asked = call.arguments.get("filter") or ()
        filters = [asked] if isinstance(asked, str) else [*asked]
        if not any(f.startswith(ALIAS) for f in filters):
            return list_models(*args, **kwargs)
        call.arguments["filter"] = filters  # an iterator is read by now
        with listing_aliases():
            return list_models(*call.args, **call.kwargs)

    return wrapper


_WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "parse_model_name": _parse_prefix, "load_pretrained": _inject_before, "save_config_for_hf": _describe_twins,
    "list_models": _list_aliases}


def register() -> None:
    """Add the twins to timm. A second call changes nothing.

    Raises:
        SEInjectError: timm has a model with the name of a twin, or does not have a function that is wrapped here. timm is
            then unchanged.
    """
    if isinstance(entrypoints(), TwinTable):
        return
    gone = missing_in_timm(_WRAPPERS)
    if gone:
        raise SEInjectError(
            f"this timm has no {gone[0]} for se_inject to wrap, and would build or save plain models "
            "for 'se_inject/...' names: use timm 1.0.15 to 1.0.31, or se_inject.inject(model)")
    timms = registry()
    old = timms._deprecated_models
    models = TwinEntrypoints(timms._model_entrypoints, old, lambda name, _: _entrypoint_of(base_name(name)))
    replace_in_timm({
        "_module_to_models": collections.defaultdict(set, {**timms._module_to_models, MODULE: TwinsOf(models)}),
        "_model_to_module": TwinTable(timms._model_to_module, old, lambda name, _: MODULE),
        "_model_default_cfgs": TwinTable(timms._model_default_cfgs, old),
        "_model_with_tags": TwinTable(timms._model_with_tags, old, tags_of_twin),
        "_model_pretrained_cfgs": TwinTable(timms._model_pretrained_cfgs, old, cfg_of_twin),
        "_model_has_pretrained": TwinSet(timms._model_has_pretrained, old),
        "_model_entrypoints": models,
    }, _WRAPPERS)
