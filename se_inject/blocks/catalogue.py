"""The blocks that a site can get, by timm's ``create_attn`` names, and what makes each an identity at the start."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..capture.meta_ops import MetaOps
from ..config import SEConfig, did_you_mean
from ..errors import ConfigError
from .identity import ScaledGate, gate_at_zero, mirror
from .squeeze_excite import SqueezeExcite, make_se, squeeze_width

LAYOUTS = ("NCHW", "NHWC", "NLC")
_OPTIONS = {  # of SEConfig, and what timm's blocks call them
    "ratio": "rd_ratio", "rd_channels": "rd_channels", "rd_divisor": "rd_divisor", "act_layer": "act_layer",
    "gate_layer": "gate_layer", "bias": "bias"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Block:
    """A kind of block.

    Attributes:
        name: What ``block=`` is given.
        cls: Called with the channels; takes and returns (N, C, H, W).
        zero: Dotted names of the layers that are zeroed for ``init="identity"``: the last before each gate.
        gates: Dotted names of the gate modules, whose value at 0 is divided out.
        first: Dotted name of a first layer before ReLU units; half of it is mirrored, so that some are on.
        positions: Whether it tells rows from columns, and so needs a map with height and width.
    """

    name: str
    cls: Callable[..., nn.Module]
    zero: tuple[str, ...] = ()
    gates: tuple[str, ...] = ()
    first: str | None = None
    positions: bool = False

    def options(self) -> set[str]:
        """The options of `SEConfig` that it takes."""
        if self.name == "se":
            return set(_OPTIONS)
        taken = inspect.signature(self.cls).parameters
        return {ours for ours, theirs in _OPTIONS.items() if theirs in taken}


_blocks: dict[str, Block] = {}
_NO_GATES = {
    **dict.fromkeys(("sk", "splat"), "replaces a convolution by several, with weights of its own"),
    **dict.fromkeys(("lambda", "bottleneck", "halo"), "replaces a convolution by self-attention"),
    **dict.fromkeys(("nl", "bat"), "adds self-attention over positions to the map, and does not gate it"),
}


def register_block(
    name: str, cls: Callable[..., nn.Module], *, zero: tuple[str, ...] = (), gates: tuple[str, ...] = (),
    first: str | None = None, positions: bool = False,
) -> None:  # fmt: skip
    """Make a block of your own known as ``block=name``.

    Args:
        name: A name that no block has.
        cls: Called as ``cls(channels)``, with those of ``rd_ratio``, ``rd_channels``, ``rd_divisor``, ``act_layer``,
            ``gate_layer``, ``bias`` that its signature takes and the user gives.
        zero: Dotted names of the layers to zero, so that the block starts as an identity.
        gates: Dotted names of gate modules; each is divided by its value at 0.
        first: Dotted name of a first layer, half of which is mirrored.
        positions: Whether it needs a map with height and width.

    Shape: the block maps (N, C, H, W) to the same; at other layouts it is given that view.

    Raises:
        ConfigError: The name is taken. The registry is then as it was.

    Example:
        >>> se_inject.register_block("mine", MyGate, zero=("fc",), gates=("gate",))  # doctest: +SKIP
    """
    _load_timm()
    if not isinstance(name, str) or not name.isidentifier():
        raise ConfigError(f"register_block({name!r}): a block's name is a word, such as 'mine'")
    if name in _blocks or name in _NO_GATES:
        raise ConfigError(f"register_block({name!r}): there is a block of that name; choose another")
    if not callable(cls):
        raise ConfigError(f"register_block({name!r}, {cls!r}): expected a class of modules")
    _blocks[name] = Block(name, cls, tuple(zero), tuple(gates), first, positions)


def block_names() -> list[str]:
    _load_timm()
    return list(_blocks)


def get_block(name: str) -> Block:
    """The block of that name.

    Raises:
        ConfigError: There is none.
    """
    _load_timm()
    if name in _NO_GATES:
        raise ConfigError(f"block={name!r} {_NO_GATES[name]}: the blocks that gate a map are {', '.join(_blocks)}")
    if name not in _blocks:
        raise ConfigError(
            f"block={name!r} is not known{did_you_mean(name, _blocks)}: the blocks are {', '.join(_blocks)}; "
            "a block of your own is made known by se_inject.register_block")
    return _blocks[name]


def _load_timm() -> None:
    """timm's attention modules that gate or shift a map."""
    if _blocks:
        return
    from timm.layers import get_attn

    from .gather_excite import GatherExcite

    conv = ("conv",)
    gate = ("gate",)
    for name, zero, gates, first, positions in (
        ("se", ("fc2",), gate, "fc1", False),
        ("ese", ("fc",), gate, None, False),
        ("eca", conv, gate, None, False),
        ("ecam", ("conv2",), gate, "conv", False),
        ("ceca", conv, gate, None, False),
        ("ge", ("mlp.fc2",), gate, "mlp.fc1", False),
        ("gc", ("mlp_scale.fc2",), gate, None, False),
        ("gca", ("mlp_add.fc2",), (), None, False),
        ("cbam", ("channel.fc2", "spatial.conv.bn"), ("channel.gate", "spatial.gate"), "channel.fc1", True),
        ("lcbam", ("channel.fc2", "spatial.conv.bn"), ("channel.gate", "spatial.gate"), "channel.fc1", True),
        ("coord", ("conv_h", "conv_w"), gate, None, True),
        ("scoord", ("fc_h", "fc_w"), gate, None, True),
        ("ela", ("norm_h", "norm_w"), gate, None, True),
        ("strip", ("conv_h", "conv_w"), gate, None, True),
    ):  # fmt: skip
        try:
            cls = GatherExcite if name == "ge" else get_attn(name)
        except AssertionError:  # an older timm, which has fewer
            continue
        _blocks[name] = Block(name, cls, zero, gates, first, positions)


class ChannelsLast(nn.Module):
    """A block for (N, C, H, W) at a site of another layout: (N, H, W, C) or (N, L, C), as L by 1."""

    def __init__(self, block: nn.Module, layout: str) -> None:
        super().__init__()
        self.block = block
        self.layout = layout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.layout == "NLC":
            y: torch.Tensor = self.block(x.transpose(1, 2).unsqueeze(-1))
            return y.squeeze(-1).transpose(1, 2)
        z: torch.Tensor = self.block(x.permute(0, 3, 1, 2))
        return z.permute(0, 2, 3, 1)


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """What one block is made of. `rd_channels` is 0 where the site leaves it to the block."""

    block: str
    channels: int
    rd_channels: int
    layout: str
    style: str
    bias: bool


def block_spec(
    config: SEConfig, channels: int, base: int, layout: str, style: str, from_input: bool = False
) -> BlockSpec:
    """The block for a site that gates `channels`; the width of SE comes from `base` channels."""
    width = squeeze_width(config, base, from_input) if config.block == "se" else config.rd_channels or 0
    return BlockSpec(config.block, channels, width, layout, style if config.block == "se" else config.block, config.bias)


def cost(spec: BlockSpec, config: SEConfig, size: tuple[int, ...]) -> tuple[int, int]:
    """Parameters, and multiply-adds for one image of `size` positions, the scale included."""
    scale = spec.channels * math.prod(size)
    if spec.block == "se":
        weights = 2 * spec.channels * spec.rd_channels
        return weights + (spec.channels + spec.rd_channels if spec.bias else 0), weights + scale
    params, macs = _measured(spec, dataclasses.replace(config, filter_fn=None, init="timm"), size)
    return params, macs + scale


@functools.lru_cache(maxsize=1024)
def _measured(spec: BlockSpec, config: SEConfig, size: tuple[int, ...]) -> tuple[int, int]:
    block = make_block(spec, config, None, 1.0, torch.device("meta"), torch.float32).eval()
    shape = (1, spec.channels, *size) if spec.layout == "NCHW" else (1, *size, spec.channels)
    with MetaOps() as counter, torch.no_grad():
        block(torch.empty(shape, device="meta"))
    return sum(p.numel() for p in block.parameters()), counter.macs


def make_block(
    spec: BlockSpec, config: SEConfig, act: str | type[nn.Module] | None, outer_gain: float, device: Any, dtype: Any
) -> nn.Module:
    """Build a block. `act` is the site's own activation, `outer_gain` a factor that the model puts behind it.

    Raises:
        ConfigError: A name that timm does not know, or ``init="identity"`` with a gate that cannot be 1.
    """
    if spec.block == "se":
        se = make_se(spec.channels, spec.rd_channels, spec.layout, spec.style, config, act, outer_gain, device, dtype)
        if config.init == "identity":
            se.__dict__[_ZEROED] = [name for name, m in se.named_children() if m is se.last_layer()]
        return se
    kind = get_block(spec.block)
    given = {theirs: getattr(config, ours) for ours, theirs in _OPTIONS.items() if _is_given(config, ours)}
    taken = inspect.signature(kind.cls).parameters
    factory = {k: v for k, v in (("device", device), ("dtype", dtype)) if k in taken}
    try:
        block = kind.cls(spec.channels, **given, **factory)
    except (KeyError, AssertionError, TypeError, ValueError) as error:
        raise ConfigError(
            f"block={spec.block!r} cannot be made for {spec.channels} channels with {given}: {error!r}") from error
    block = block.to(device=device, dtype=dtype)
    whole = block if spec.layout == "NCHW" else ChannelsLast(block, spec.layout)
    if config.init == "identity":
        _make_identity(kind, block, outer_gain)
        whole.__dict__[_ZEROED] = [path if whole is block else f"block.{path}" for path in kind.zero]
    return whole


_ZEROED = "_se_zeroed"  # on a block that started as an identity: the layers that make it one while they are 0


def is_identity(block: nn.Module) -> bool:
    """Whether a block still is the identity that it started as: the layers before its gates are zero."""
    layers = [block.get_submodule(path) for path in block.__dict__.get(_ZEROED, ())]
    weights = [p for layer in layers for p in layer.parameters()]
    return bool(weights) and not any(p.is_meta or bool(p.any()) for p in weights)


def _is_given(config: SEConfig, option: str) -> bool:
    return bool(getattr(config, option) != getattr(SEConfig, option))


def _make_identity(kind: Block, block: nn.Module, outer_gain: float) -> None:
    """Zero what `kind` says, mirror its first layer, and divide its gates by their value at 0, in place."""
    for path in kind.zero:
        for parameter in block.get_submodule(path).parameters():
            nn.init.zeros_(parameter)
    if kind.first is not None:
        mirror(block.get_submodule(kind.first))
    for i, path in enumerate(kind.gates):
        parent, _, name = path.rpartition(".")
        owner = block.get_submodule(parent)
        gate = getattr(owner, name)
        if not isinstance(gate, nn.Module):
            raise ConfigError(f"block={kind.name!r}: its gate {path!r} is no module")
        setattr(owner, name, ScaledGate(gate, 1 / gate_at_zero(gate)[0] / (outer_gain if i == 0 else 1.0)))


def problem(config: SEConfig, outer_gain: float = 1.0) -> str | None:
    """Why `config`'s block cannot be used as asked, or None: unknown, an option it lacks, or no identity at the start.

    Raises:
        ConfigError: The block or a name in the options is not known.
    """
    kind = get_block(config.block)
    lacks = [o for o in _OPTIONS if _is_given(config, o) and o not in kind.options()]
    if lacks:
        has = ", ".join(sorted(kind.options())) or "none"
        return f"block={config.block!r} has no option {lacks[0]!r}; of the block's options it has {has}"
    if config.init == "identity":
        return _identity_problem(dataclasses.replace(config, filter_fn=None), outer_gain)
    return None


@functools.lru_cache(maxsize=256)
def _identity_problem(config: SEConfig, outer_gain: float) -> str | None:
    """Try a small block: it must return its input exactly, in both modes, and have a gradient."""
    head = f"block={config.block!r} with init='identity'"
    advice = "use init='timm', or another block"
    with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        block = make_block(BlockSpec(config.block, 16, config.rd_channels or 0 if config.block != "se" else 8, "NCHW",
                                     "se", config.bias), config, None, outer_gain, torch.device("cpu"), torch.float32)
        x = torch.randn(2, 16, 8, 8)
        for training in (True, False):
            block.train(training)
            y = block(x)
            if y.shape != x.shape:
                return f"{head}: it returns {tuple(y.shape)} for {tuple(x.shape)}, and a gate keeps the shape"
            if not torch.equal(y * outer_gain, x):
                behind = f" with the factor {outer_gain:g} that the model puts behind it" if outer_gain != 1 else ""
                return f"{head}{behind}: it does not return its input at the start; {advice}"
        block.train()
        (block(x) * torch.randn(2, 16, 8, 8)).sum().backward()
    if not any(p.grad is not None and p.grad.abs().sum() > 0 for p in block.parameters()):
        return f"{head}: none of its parameters would have a gradient; {advice}"
    return None


def gains(block: nn.Module) -> list[tuple[nn.Module, float]]:
    """The modules in a block that multiply a gate by a constant, and it."""
    return [(m, m.gain) for m in block.modules() if isinstance(m, (SqueezeExcite, ScaledGate)) and m.gain != 1.0]
