"""The block of one site: its width and cost, the module itself, and why a block cannot be used."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ..config import SEConfig
from ..errors import ConfigError
from ..undo import entered
from .catalogue import OPTIONS, get_block, parameters_of
from .identity import make_identity
from .masks import WEIGHS
from .start import is_on_meta, remember_start


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """What a site says of its block. `rd_channels` is 0 if the block chooses its width."""

    channels: int
    rd_channels: int
    layout: str
    style: str


class AsMap(nn.Module):
    """A block for (N, C, H, W) at a site of another layout: a sequence becomes a map of L by 1, a volume one of D by HW."""

    def __init__(self, block: nn.Module, layout: str) -> None:
        super().__init__()
        self.block = block
        self.layout = layout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.layout == "NLC":
            y: torch.Tensor = self.block(x.transpose(1, 2).unsqueeze(-1))
            return y.squeeze(-1).transpose(1, 2)
        if self.layout == "NCL":
            signal: torch.Tensor = self.block(x.unsqueeze(-1))
            return signal.squeeze(-1)
        if self.layout == "NCDHW":
            volume: torch.Tensor = self.block(x.flatten(3))
            return volume.reshape(x.shape)
        if self.layout == "NDHWC":
            last: torch.Tensor = self.block(x.flatten(2, 3).permute(0, 3, 1, 2))
            return last.permute(0, 2, 3, 1).reshape(x.shape)
        z: torch.Tensor = self.block(x.permute(0, 3, 1, 2))
        return z.permute(0, 2, 3, 1)


def block_spec(
    config: SEConfig, channels: int, base: int, layout: str, style: str, from_input: bool = False
) -> BlockSpec:
    """The block for a site that gates `channels`; see `squeeze_width` for `base` and `from_input`."""
    row = get_block(config.block)
    width = config.rd_channels or 0 if row.width is None else row.width(config, base, from_input)
    return BlockSpec(channels, width, layout, style if style in row.styles else row.name)


def make_block(
    spec: BlockSpec, config: SEConfig, act: str | type[nn.Module] | None, outer_gain: float, device: Any, dtype: Any
) -> nn.Module:
    """Create the block of one site.

    Args:
        spec: What the site says.
        config: Which block, and its options.
        act: The owner's own activation, or None.
        outer_gain: A factor that the model applies to the output of the block.
        device: Device of the parameters.
        dtype: Data type of the parameters.

    Raises:
        ConfigError: timm does not know a name, or ``init="identity"`` is asked of a gate that cannot be 1.
    """
    row = get_block(config.block).styled(spec.style)
    values: dict[str, Any] = {theirs: getattr(config, ours) for ours, theirs in OPTIONS.items() if _is_given(config, ours)}
    if row.width is not None:
        values["rd_channels"] = spec.rd_channels
    if row.site_act and act is not None:
        values.setdefault("act_layer", act)
    native = spec.layout in row.layouts
    if native and spec.layout != "NCHW":
        values["layout"] = spec.layout
    taken = parameters_of(row.cls)
    arguments = {key: value for key, value in values.items() if key in taken}
    factory = {key: value for key, value in (("device", device), ("dtype", dtype)) if key in taken}
    try:
        with entered(*() if len(factory) == 2 else (torch.device(device),)):
            block = row.cls(spec.channels, **arguments, **factory)
    except (KeyError, AssertionError, TypeError, ValueError) as error:
        advice = ("give act_layer and gate_layer as names of timm.layers.create_act, such as 'relu', 'silu' or 'sigmoid'"
                  if arguments.keys() & {"act_layer", "gate_layer"} else "its class has to accept such a call")
        raise ConfigError(
            f"block={config.block!r} cannot be created for {spec.channels} channels with {arguments} ({error!r}): {advice}"
        ) from error
    if is_on_meta(block) and torch.device(device).type != "meta":  # inside accelerate's init_empty_weights
        block = _initialized(block.to_empty(device=device))
    if len(factory) < 2:
        block = block.to(device=device, dtype=dtype)
    if config.init == "identity":
        make_identity(row.start, block, outer_gain)
    made = block if native else AsMap(block, spec.layout)
    if row.weighs:
        made.__dict__[WEIGHS] = True
    config = dataclasses.replace(config, filter_fn=None)  # which a pickle could not hold
    return remember_start(made, functools.partial(make_block, spec, config, act, outer_gain))


def _initialized(block: nn.Module) -> nn.Module:
    """A block with memory but no values, initialized in place as far as its layers can."""
    for m in block.modules():
        if callable(reset := getattr(m, "reset_parameters", None)):
            reset()
    return block


def cost(spec: BlockSpec, config: SEConfig, size: tuple[int, ...]) -> tuple[int, int]:
    """Parameters, and multiply-adds for one image of `size` positions: the layers of the block and the scale."""
    params, macs = _measured(spec, dataclasses.replace(config, filter_fn=None, init="timm"), size)
    return params, macs + spec.channels * math.prod(size)


@functools.lru_cache(maxsize=1024)
def _measured(spec: BlockSpec, config: SEConfig, size: tuple[int, ...]) -> tuple[int, int]:
    block = make_block(spec, config, None, 1.0, torch.device("meta"), torch.float32).eval()
    shape = (1, spec.channels, *size) if spec.layout.index("C") == 1 else (1, *size, spec.channels)
    counter = _MultiplyAdds()
    with entered(counter, torch.no_grad()):
        block(torch.empty(shape, device="meta"))
    return sum(p.numel() for p in block.parameters()), counter.macs


class _MultiplyAdds(TorchDispatchMode):
    """Counts multiply-adds by torch's formulas.

    torch's own `FlopCounterMode` counts the same, but hooks the modules of all threads and imports the compiler.
    """

    macs = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled inside, and the guard against it imports the compiler

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.macs += formula(*args, **kwargs, out_val=out) // 2
        return out


def problem(config: SEConfig, outer_gain: float = 1.0) -> str | None:
    """Why the block of `config` cannot be used as asked: an option that it does not have, or no identity at the start.

    Returns:
        The reason, or None.

    Raises:
        ConfigError: The block or a name in the options is not known.
    """
    options = get_block(config.block).options()
    lacks = [option for option in OPTIONS if _is_given(config, option) and option not in options]
    if lacks:
        return (f"block={config.block!r} has no option {lacks[0]!r}: leave it out; the options of this block are "
                f"{', '.join(sorted(options)) or 'none'}")
    if config.init == "identity":
        return _identity_problem(dataclasses.replace(config, filter_fn=None), outer_gain)
    return None


def changes_its_input(config: SEConfig) -> bool:
    """Whether the block of `config` writes into the map that it gates."""
    return _changes_its_input(dataclasses.replace(config, filter_fn=None, init="timm"))


@functools.lru_cache(maxsize=256)
def _changes_its_input(config: SEConfig) -> bool:
    with entered(torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.no_grad()):
        x = torch.randn(2, 16, 8, 8)
        before = x._version
        try:
            _small_block(config, 1.0)(x)
        except MemoryError:
            raise
        except Exception:  # it takes other maps
            return False
        return x._version != before


def _small_block(config: SEConfig, outer_gain: float) -> nn.Module:
    spec = BlockSpec(channels=16, rd_channels=8, layout="NCHW", style=config.block)
    return make_block(spec, config, None, outer_gain, torch.device("cpu"), torch.float32)


@functools.lru_cache(maxsize=256)
def _identity_problem(config: SEConfig, outer_gain: float) -> str | None:
    """Try a small block: it has to return its input exactly, in both modes, and to have a gradient."""
    head = f"block={config.block!r} with init='identity'"
    advice = "use init='timm', or another block"
    with entered(torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.enable_grad()):
        torch.manual_seed(0)
        block = _small_block(config, outer_gain)
        x = torch.randn(2, 16, 8, 8)
        for training in (True, False):
            block.train(training)
            try:
                y = block(x.clone())  # it may write into it
            except MemoryError:
                raise
            except Exception as error:
                return f"{head}: it raises {error!r} on a map of shape {tuple(x.shape)}; {advice}"
            if not isinstance(y, torch.Tensor):
                return f"{head}: it returns a {type(y).__name__}, and a gate returns a map; {advice}"
            if y.shape != x.shape:
                return f"{head}: it returns {tuple(y.shape)} for {tuple(x.shape)}, and a gate keeps the shape; {advice}"
            if not torch.equal(y * outer_gain, x):
                behind = f" with the factor {outer_gain:g} that the model applies to it" if outer_gain != 1 else ""
                return f"{head}{behind}: it does not return its input at the start; {advice}"
        block.train()
        y = block(x.requires_grad_().clone())
        if y.requires_grad:
            (y * torch.randn(2, 16, 8, 8)).sum().backward()
    if not any(p.grad is not None and p.grad.abs().sum() > 0 for p in block.parameters()):
        return f"{head}: none of its parameters would have a gradient; {advice}"
    return None


def _is_given(config: SEConfig, option: str) -> bool:
    return bool(getattr(config, option) != getattr(SEConfig, option))
