"""What timm calls an injected model: its name, and the arguments that make it anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from .config import SEConfig

PREFIX = "se_inject/"
ALIAS = "se_inject_"
SEVERAL = "se_injections"


def base_name(name: str) -> str:
    """A timm name without the prefix of its twin."""
    for prefix in (PREFIX, ALIAS):
        if name.startswith(prefix):
            return name[len(prefix):]
    return name


def architecture_of(model: object) -> str | None:
    """The timm name that a model says of itself, or None."""
    cfg: Any = getattr(model, "pretrained_cfg", None)
    name = cfg.get("architecture") if hasattr(cfg, "get") else None
    return str(name) if name else None


def rename(model: nn.Module, injected: bool) -> None:
    """Give a model of timm's the name of what it now is, the twin or the base, in place."""
    cfg: Any = getattr(model, "pretrained_cfg", None)
    name = architecture_of(model)
    if isinstance(cfg, dict) and name is not None:
        new = {**cfg, "architecture": (PREFIX if injected else "") + base_name(name)}
        # not by setattr: an owner whose attributes are set is traced anew
        model.__dict__.update({key: new for key in ("pretrained_cfg", "default_cfg") if key in model.__dict__})


def model_args(model: nn.Module) -> dict[str, Any]:
    """timm's arguments that make the base of `model` as it is now, with its head and input size reset, say."""
    try:
        from timm.models import get_model_args
    except ImportError:  # before timm 1.0.29
        args = dict(getattr(model, "_model_args", {}))
        given: Any = getattr(model, "pretrained_cfg", None)
        usual = {"num_classes": given.get("num_classes"), "in_chans": (given.get("input_size") or (3,))[0]} if given else {}
        for key, value in usual.items():
            now = getattr(model, key, None)
            if isinstance(now, int) and (key in args or now != value):
                args[key] = now
    else:
        args = get_model_args(model)
    return {key: value for key, value in args.items() if not key.startswith("se_")}


def door_options(configs: Sequence[SEConfig]) -> dict[str, Any]:
    """Injections as arguments of ``timm.create_model("se_inject/...")``, as JSON types."""
    if len(configs) == 1:
        return {f"se_{key}": value for key, value in configs[0].to_dict().items()}
    return {SEVERAL: [config.to_dict() for config in configs]}
