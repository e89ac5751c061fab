"""`SEConfig`: which sites get a block, and what the block is."""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any

from .errors import ConfigError
from .site import Site

PLACEMENTS = ("auto", "standard", "inner", "pre", "post", "identity")
INITS = ("identity", "timm")
EXISTING = ("skip", "stack", "replace")


@dataclasses.dataclass(frozen=True)
class SEConfig:
    """The options of an injection, frozen, and checked when the object is made.

    Every field is also a keyword of `plan` and `inject`, and a keyword of ``timm.create_model("se_inject/...")`` with the
    prefix ``se_``.

    Args:
        ratio: Squeeze width over gated channels, in (0, 1]. None is 1/16, or, at a site of EfficientNet's kind, 1/4 of
            the input channels of the inverted residual.
        rd_channels: A fixed squeeze width; excludes `ratio`.
        rd_divisor: The width is rounded to a multiple of this. None is 8 (as in timm's SEModule) or 1 (as in
            EfficientNet's SqueezeExcite).
        placement: ``auto`` (a slot that the author left empty, otherwise ``standard``), ``standard``, ``inner``, ``pre``,
            ``post`` or ``identity``.
        block: Name of the block: ``se``, ``film`` (which also shifts each channel), one of timm's ``create_attn`` names, or a
            name given to `register_block`.
        init: ``identity`` (all gates are 1 until the blocks are trained) or ``timm`` (timm's own initialization and plain
            gate).
        act_layer: Activation between the two excitation layers, by timm's ``create_act`` name. None is ReLU, or, at an
            inner place, the owner's own activation.
        gate_layer: Gate function, by timm's ``create_act`` name. None is the sigmoid.
        bias: Whether the two excitation layers have a bias.
        stages: Stage numbers, as timm's ``out_indices``; None is all.
        include: Globs over site paths; None is all.
        exclude: Globs over site paths; None is none.
        min_channels: Sites with fewer gated channels are skipped.
        filter_fn: Called with each `Site`; a false result skips it. A file of `save` lists the chosen sites instead.
        existing: What to do with a branch that has channel attention already: ``skip`` the branch, ``stack`` a block on
            it, or ``replace`` the attention. A replaced module loses its weights, so that the outputs change.

    Raises:
        ConfigError: A value is out of range, or two options exclude each other.

    Source: Hu et al., Squeeze-and-Excitation Networks, arXiv 1709.01507, sections 3 and 6.

    Example:
        >>> import se_inject
        >>> config = se_inject.SEConfig(ratio=1 / 8, stages=(3, 4))
        >>> [site.path for site in se_inject.plan("test_resnet", config).sites]
        ['layer3.0.se', 'layer4.0.se']
        >>> config.to_dict()
        {'ratio': 0.125, 'stages': [3, 4]}
    """

    ratio: float | None = None
    rd_channels: int | None = None
    rd_divisor: int | None = None
    placement: str = "auto"
    block: str = "se"
    init: str = "identity"
    act_layer: str | None = None
    gate_layer: str | None = None
    bias: bool = True
    stages: tuple[int, ...] | None = None
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None
    min_channels: int = 0
    filter_fn: Callable[[Site], bool] | None = dataclasses.field(default=None, compare=False)
    existing: str = "skip"

    def __post_init__(self) -> None:
        for name, kind, fits in (
                ("ratio", float, _is_number), ("rd_channels", int, _is_int), ("rd_divisor", int, _is_int),
                ("min_channels", int, _is_int)):
            value = getattr(self, name)
            if fits(value) and not isinstance(value, (int, float)):  # NumPy's, which JSON does not take
                object.__setattr__(self, name, kind(value))
        if self.ratio is not None and not (_is_number(self.ratio) and 0 < self.ratio <= 1):
            raise ConfigError(
                f"ratio={self.ratio!r}: it is squeeze width over channels, in (0, 1]{_ratio_hint(self.ratio)}")
        if self.ratio is not None and self.rd_channels is not None:
            raise ConfigError(
                f"ratio={self.ratio!r} and rd_channels={self.rd_channels!r} both set the squeeze width: give one")
        for name in ("rd_channels", "rd_divisor"):
            value = getattr(self, name)
            if value is not None and not (_is_int(value) and value >= 1):
                raise ConfigError(f"{name}={value!r}: expected a whole number of at least 1, or None")
        if not (_is_int(self.min_channels) and self.min_channels >= 0):
            raise ConfigError(f"min_channels={self.min_channels!r}: expected a whole number of at least 0")
        for name, allowed in (("placement", PLACEMENTS), ("init", INITS), ("existing", EXISTING)):
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(f"{name}={value!r}: expected one of {', '.join(allowed)}{did_you_mean(value, allowed)}")
        if not isinstance(self.block, str) or not self.block:
            raise ConfigError(f"block={self.block!r}: expected the name of a block, such as 'se'")
        for name in ("act_layer", "gate_layer"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value):
                raise ConfigError(f"{name}={value!r}: expected a name that timm's create_act knows, such as 'silu'")
        if not isinstance(self.bias, bool):
            raise ConfigError(f"bias={self.bias!r}: expected True or False")
        if self.filter_fn is not None and not callable(self.filter_fn):
            raise ConfigError(f"filter_fn={self.filter_fn!r}: expected a function of one Site")
        object.__setattr__(self, "stages", _as_tuple("stages", self.stages, int))
        object.__setattr__(self, "include", _as_tuple("include", self.include, str))
        object.__setattr__(self, "exclude", _as_tuple("exclude", self.exclude, str))
        for name in ("include", "exclude"):
            for pattern in getattr(self, name) or ():
                if "," in pattern:  # as on a command line; no path has a comma, so that nothing would match
                    raise ConfigError(f"{name}={pattern!r}: a comma stands between two globs; write "
                                      f"{name}={pattern.replace(' ', '').split(',')}")

    @classmethod
    def of(cls, config: SEConfig | dict[str, Any] | None = None, **options: Any) -> SEConfig:
        """Return `config` with `options` on top of it. Changes neither.

        Raises:
            ConfigError: An option is unknown (the message names the nearest known one), or has a bad value.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        if isinstance(config, dict):
            options = {**config, **options}
            config = None
        elif config is not None and not isinstance(config, cls):
            raise ConfigError(f"config={config!r}: expected an SEConfig, a dict of its fields, or None")
        for key in options:
            if key not in names:
                raise ConfigError(f"unknown option {key!r}{did_you_mean(key, names)}; the options are {', '.join(names)}")
        return dataclasses.replace(config or cls(), **options)

    def to_dict(self) -> dict[str, Any]:
        """Return the options that differ from the defaults, as JSON types.

        Raises:
            ConfigError: `filter_fn` is set: a function cannot be written to a file.
        """
        if self.filter_fn is not None:
            raise ConfigError("filter_fn is a function and cannot be written to a file: use include= or exclude=")
        out: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if value != f.default:
                out[f.name] = list(value) if isinstance(value, tuple) else value
        return out


def _is_int(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _ratio_hint(ratio: Any) -> str:
    if isinstance(ratio, str):
        return "; write a number, such as 0.125"
    return f"; for a reduction of {ratio:g} write ratio=1/{ratio:g}" if _is_number(ratio) and ratio > 1 else ""


def _as_tuple(name: str, value: Any, kind: type) -> tuple[Any, ...] | None:
    if value is None:
        return None
    if kind is int and _is_int(value):
        return (int(value),)
    if isinstance(value, kind) and not isinstance(value, bool):
        return (value,)
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes)):
        raise ConfigError(f"{name}={value!r}: expected {kind.__name__} or a sequence of {kind.__name__}")
    items = tuple(int(item) if kind is int and _is_int(item) else item for item in value)
    for item in items:
        if not isinstance(item, kind) or isinstance(item, bool):
            raise ConfigError(f"{name}={value!r}: {item!r} is not of type {kind.__name__}")
    return items


def did_you_mean(value: object, known: Iterable[str]) -> str:
    """The end of a message: the known name that is nearest to `value`, or nothing."""
    close = difflib.get_close_matches(str(value), list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
