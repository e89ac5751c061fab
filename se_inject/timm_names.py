"""timm's words for an injected model: its name, and the arguments that create it."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

from torch import nn

from .config import SEConfig
from .errors import ConfigError

FEATURE_METHODS = ("forward_features", "forward_intermediates")  # of timm's models: they call the modules that `forward` calls
PREFIX = "se_inject/"
ALIAS = "se_inject_"  # for scripts that take no slash in a name
SEVERAL = "se_injections"  # the argument of timm.create_model for more than one injection


def base_name(name: str) -> str:
    """The name of the base: `name` without the prefix of the twin."""
    for prefix in (PREFIX, ALIAS):
        if name.startswith(prefix):
            return name[len(prefix):]
    return name


def architecture_of(model: object) -> str | None:
    """The timm name in a model's `pretrained_cfg`, or None."""
    cfg: Any = getattr(model, "pretrained_cfg", None)
    name = cfg.get("architecture") if hasattr(cfg, "get") else None
    return str(name) if name else None


def tagged_name(model: object) -> str | None:
    """The timm name of a model's base, with the tag of its weights where timm takes others by the name alone; or None."""
    architecture = architecture_of(model)
    if architecture is None:
        return None
    import timm

    name, tag = base_name(architecture), getattr(model, "pretrained_cfg", {}).get("tag")
    usual = timm.get_pretrained_cfg(name, allow_unregistered=True)
    known = tag and timm.models.is_model_pretrained(f"{name}.{tag}") and tag != getattr(usual, "tag", None)
    return f"{name}.{tag}" if known else name


def rename(model: nn.Module, injected: bool) -> None:
    """Set the timm name of a model to that of the twin (`injected`) or of the base, in place."""
    cfg: Any = getattr(model, "pretrained_cfg", None)
    name = architecture_of(model)
    if isinstance(cfg, dict) and name is not None:
        new = {**cfg, "architecture": (PREFIX if injected else "") + base_name(name)}
        # written to __dict__, because setattr on an owner would make it trace again
        model.__dict__.update({key: new for key in ("pretrained_cfg", "default_cfg") if key in model.__dict__})


def remember_args(model: nn.Module, args: dict[str, Any]) -> nn.Module:
    """Keep the arguments of `timm.create_model` with its model, and return the model. Newer timm keeps the same itself."""
    if not hasattr(model, "_model_args"):
        loading = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "device", "dtype")
        model.__dict__["_model_args"] = {k: v for k, v in args.items() if k not in loading}
    return model


def model_args(model: nn.Module) -> dict[str, Any]:
    """The arguments of `timm.create_model` that create the base of `model` as it is now, a reset head included."""
    try:
        from timm.models import get_model_args
    except ImportError:  # before timm 1.0.29
        args = dict(getattr(model, "_model_args", {}))
        cfg: Any = getattr(model, "pretrained_cfg", None)
        usual = {"num_classes": cfg.get("num_classes"), "in_chans": (cfg.get("input_size") or (3,))[0]} if cfg else {}
        for key, value in usual.items():
            now = getattr(model, key, None)
            if isinstance(now, int) and (key in args or now != value):
                args[key] = now
    else:
        args = get_model_args(model)
    return {key: value for key, value in args.items() if not key.startswith("se_")}


def door_options(configs: Sequence[SEConfig]) -> dict[str, Any]:
    """The configs of injections as arguments of ``timm.create_model("se_inject/...")``, as JSON types."""
    if len(configs) == 1:
        return {f"se_{key}": value for key, value in configs[0].to_dict().items()}
    return {SEVERAL: [config.to_dict() for config in configs]}


def split_options(kwargs: dict[str, Any]) -> tuple[tuple[SEConfig, ...], dict[str, Any]]:
    """Separate the ``se_<option>`` arguments, those of an injection, from timm's arguments. Does not change `kwargs`.

    ``se_injections``, a list of dicts of options, stands for several injections.

    Returns:
        The configs, one for each injection, and timm's arguments.

    Raises:
        ConfigError: A value is wrong, or a name is nearly that of an option.
    """
    known = {f"se_{f.name}": f.name for f in dataclasses.fields(SEConfig)}
    options = {known[k]: v for k, v in kwargs.items() if k in known}
    several = kwargs.get(SEVERAL)
    rest = {k: v for k, v in kwargs.items() if k not in known and k != SEVERAL}
    for key in rest:
        close = difflib.get_close_matches(key, [*known, SEVERAL], n=1, cutoff=0.85) if key.startswith("se_") else []
        if close:
            raise ConfigError(f"unknown option {key!r} (did you mean {close[0]!r}?); the options are {', '.join(known)}")
    if several is None:
        return (SEConfig.of(**options),), rest
    if options or not isinstance(several, (list, tuple)) or not several:
        raise ConfigError(
            f"{SEVERAL}={several!r} with {', '.join(options) or 'no other option'}: give a list with one dict of options "
            "for each injection, such as [{'stages': 3}, {'stages': 4, 'ratio': 0.25}], and no other se_ option")
    return tuple(SEConfig.of(config) for config in several), rest


def skeleton(name: str, **args: Any) -> nn.Module:
    """Create the base of a timm name without memory for its weights; see `without_values`. `args` are timm's.

    Raises:
        ConfigError: timm has no such model, or does not know an argument.
    """
    import timm
    from timm.models import get_arch_name

    from .capture.inputs import without_values  # here, because timm's import brings this file, and needs no traces

    bare = base_name(name)
    if ":" not in bare and not timm.is_model(bare):  # timm looks up "hf-hub:" and "local-dir:" itself
        raise ConfigError(unknown_model_message(name, get_arch_name(bare)))
    try:
        return without_values(lambda: timm.create_model(bare, **args))
    except Exception as error:
        given, leave = f" with {args}", ": leave out the arguments that this model does not take"
        raise ConfigError(f"timm cannot create {bare!r}{given if args else ''} ({error!r}){leave if args else ''}") from error


def unknown_model_message(name: str, architecture: str) -> str:
    """The message about a name that timm does not have; `architecture` is the name without prefix and tag."""
    import timm

    close = difflib.get_close_matches(architecture, timm.list_models(), n=3)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else "; timm.list_models() has the names"
    return f"timm has no model {name!r}{hint}"
