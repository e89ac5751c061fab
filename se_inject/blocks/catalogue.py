"""The blocks that a site can get, by name: one row for each."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping

from timm.layers import get_attn
from torch import nn

from ..config import SEConfig, did_you_mean
from ..errors import ConfigError
from .film import ScaleAndShift
from .gather_excite import GatherExcite
from .identity import Start
from .squeeze_excite import LAYOUTS, EfficientNetSqueezeExcite, SqueezeExcite, squeeze_width

OPTIONS = {  # fields of SEConfig that belong to the block, and their names in timm's constructors
    "ratio": "rd_ratio", "rd_channels": "rd_channels", "rd_divisor": "rd_divisor", "act_layer": "act_layer",
    "gate_layer": "gate_layer", "bias": "bias"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Block:
    """One row of the catalogue: how a block is created, and what makes it an identity.

    Attributes:
        name: The value of ``block=``.
        cls: Called with the number of channels, and with those options that its signature has and the user gives.
        start: The modules that make the block an identity.
        positions: Whether it distinguishes rows from columns, and so needs a map with height and width.
        weighs: Whether its squeeze weighs positions by their values, and is more than a mean or maximum of them.
        layouts: The layouts that it takes. `cls` gets a keyword `layout` for all but NCHW. At a site of a layout that is
            not among them, the block gets an NCHW view.
        width: Called with the config, a number of channels, and whether those are the input channels of an inverted
            residual; returns the squeeze width, which `cls` gets as `rd_channels`. None leaves the width to `cls`.
        site_act: Whether the activation is the owner's, where the user gives none.
        styles: Rows of the same block under other keys, by `Site.style`.
    """

    name: str
    cls: Callable[..., nn.Module]
    start: Start = Start()  # noqa: RUF009 (it is frozen)
    positions: bool = False
    weighs: bool = False
    layouts: tuple[str, ...] = ("NCHW",)
    width: Callable[[SEConfig, int, bool], int] | None = None
    site_act: bool = False
    styles: Mapping[str, Block] = dataclasses.field(default_factory=dict)

    def options(self) -> set[str]:
        """The fields of `SEConfig` that the block takes."""
        taken = parameters_of(self.cls)
        of_width = {"ratio", "rd_channels", "rd_divisor"} if self.width is not None else set()
        return {ours for ours, theirs in OPTIONS.items() if theirs in taken} | of_width

    def styled(self, style: str) -> Block:
        """The row for a site of this style."""
        return self.styles.get(style, self)


@functools.lru_cache(maxsize=64)
def parameters_of(cls: Callable[..., nn.Module]) -> frozenset[str]:
    """The names of the arguments that a class of blocks takes."""
    return frozenset(inspect.signature(cls).parameters)


_SE = Block(
    "se", SqueezeExcite, Start(("fc2",), ("gate",), "fc1"), layouts=LAYOUTS, width=squeeze_width, site_act=True)
_EFFICIENTNET_SE = dataclasses.replace(
    _SE, cls=EfficientNetSqueezeExcite, start=Start(("conv_expand",), ("gate",), "conv_reduce"))
_rows = {
    "se": dataclasses.replace(_SE, styles={"efficientnet": _EFFICIENTNET_SE}),
    "film": dataclasses.replace(_SE, name="film", cls=ScaleAndShift, start=Start(("fc2", "shift"), ("gate",), "fc1")),
}
for _name, _start, _positions in (  # timm's, by their create_attn names
    ("ese", Start(("fc",), ("gate",)), False),
    ("eca", Start(("conv",), ("gate",)), False),
    ("ecam", Start(("conv2",), ("gate",), "conv"), False),
    ("ceca", Start(("conv",), ("gate",)), False),
    ("ge", Start(("mlp.fc2",), ("gate",), "mlp.fc1"), False),
    ("gc", Start(("mlp_scale.fc2",), ("gate",)), False),
    ("gca", Start(("mlp_add.fc2",)), False),
    ("cbam", Start(("channel.fc2", "spatial.conv.bn"), ("channel.gate", "spatial.gate"), "channel.fc1"), True),
    ("lcbam", Start(("channel.fc2", "spatial.conv.bn"), ("channel.gate", "spatial.gate"), "channel.fc1"), True),
    ("coord", Start(("conv_h", "conv_w"), ("gate",)), True),
    ("scoord", Start(("fc_h", "fc_w"), ("gate",)), True),
    ("ela", Start(("norm_h", "norm_w"), ("gate",)), True),
    ("strip", Start(("conv_h", "conv_w"), ("gate",)), True),
):  # fmt: skip
    with contextlib.suppress(AssertionError):  # an older timm has fewer
        _cls = GatherExcite if _name == "ge" else get_attn(_name)
        _rows[_name] = Block(_name, _cls, _start, _positions, weighs=_name in ("gc", "gca"))
_NO_GATES = {
    **dict.fromkeys(("sk", "splat"), "replaces a convolution by several, with weights of its own"),
    **dict.fromkeys(("lambda", "bottleneck", "halo"), "replaces a convolution by self-attention"),
    **dict.fromkeys(("nl", "bat"), "adds self-attention over positions to the map, and does not gate it"),
}


def register_block(
    name: str, cls: Callable[..., nn.Module], *, zero: tuple[str, ...] = (), gates: tuple[str, ...] = (),
    first: str | None = None, positions: bool = False,
) -> None:  # fmt: skip
    """Add a block of your own, for ``block=name``.

    With ``init="identity"``, the layers `zero` are zeroed and each gate is divided by its value at 0. A small block is
    then tried before an injection: it has to return its input exactly, and to have a gradient.

    Args:
        name: A name that no block has.
        cls: Called as ``cls(channels)``, with those of ``rd_ratio``, ``rd_channels``, ``rd_divisor``, ``act_layer``,
            ``gate_layer`` and ``bias`` that its signature has and the user gives.
        zero: Dotted names of the layers to zero, so that the block starts as an identity.
        gates: Dotted names of the gate modules, each to be divided by its value at 0.
        first: Dotted name of a layer before ReLU units. Half of it is mirrored, so that some of the units are on.
        positions: Whether the block needs a map with height and width.

    Raises:
        ConfigError: The name is taken or no word, or `cls` cannot be called. The catalogue is then unchanged.

    Shape: the block maps (N, C, H, W) to (N, C, H, W). At a site of another layout it gets such a view.

    Example:
        >>> import se_inject, timm, torch
        >>> class Gate(torch.nn.Module):
        ...     def __init__(self, channels):
        ...         super().__init__()
        ...         self.fc = torch.nn.Conv2d(channels, channels, 1)
        ...         self.gate = torch.nn.Sigmoid()
        ...     def forward(self, x):
        ...         return x * self.gate(self.fc(x.mean((2, 3), keepdim=True)))
        >>> se_inject.register_block("plain_gate", Gate, zero=("fc",), gates=("gate",))
        >>> model = se_inject.inject(timm.create_model("test_resnet"), block="plain_gate")
        >>> type(model.layer1[0].se).__name__
        'Gate'
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ConfigError(f"register_block({name!r}): the name of a block is one word; write a name such as 'mine'")
    if name in _rows or name in _NO_GATES:
        raise ConfigError(f"register_block({name!r}): there is a block of that name; choose another name")
    if not callable(cls) or isinstance(cls, nn.Module):
        raise ConfigError(f"register_block({name!r}, {cls!r}): expected a class of modules, not an object of it")
    for option, value in (("zero", zero), ("gates", gates)):
        if isinstance(value, str):
            raise ConfigError(f"register_block({name!r}, {option}={value!r}): expected names; write {option}=({value!r},)")
    _rows[name] = Block(name, cls, Start(tuple(zero), tuple(gates), first), positions, weighs=True)  # for all that is known


def block_names() -> list[str]:
    return list(_rows)


def get_block(name: str) -> Block:
    """The row of that name.

    Raises:
        ConfigError: There is none.
    """
    if name in _NO_GATES:
        raise ConfigError(f"block={name!r} {_NO_GATES[name]}: use one of the blocks that gate a map, {', '.join(_rows)}")
    if name not in _rows:
        raise ConfigError(
            f"block={name!r} is not known{did_you_mean(name, _rows)}: the blocks are {', '.join(_rows)}; "
            "add a block of your own with se_inject.register_block")
    return _rows[name]
