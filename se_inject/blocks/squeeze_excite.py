"""The squeeze-and-excitation block, and nothing else.

Source: Hu et al., Squeeze-and-Excitation Networks, arXiv 1709.01507, section 3; keys as timm's
SEModule (``fc1``, ``fc2``) and EfficientNet's SqueezeExcite (``conv_reduce``, ``conv_expand``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..config import SEConfig
from ..errors import ConfigError
from .autograd import scale, squeeze
from .identity import identity_gain, mirror


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation: scales each channel by a gate computed from all channels' means.

    Args:
        channels: Channels C of the input.
        rd_channels: Squeeze width.
        layout: ``NCHW`` (1x1 convolutions), ``NHWC`` or ``NLC`` (linear layers).
        bias: Whether the two layers have a bias.
        act_layer: Activation, by timm's name, or its class.
        gate_layer: Gate function, by timm's name.
        gain: The gate is multiplied by this.

    Shape: (N, C, H, W), (N, H, W, C) or (N, L, C), as `layout` says; the output is like the input.
    """

    def __init__(
        self, channels: int, rd_channels: int, layout: str = "NCHW", bias: bool = True,
        act_layer: str | type[nn.Module] = "relu",
        gate_layer: str = "sigmoid", gain: float = 1.0, device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        from timm.layers import create_act_layer

        self.channels = channels
        self.layout = layout
        self.gain = gain
        self.dims = {"NCHW": [2, 3], "NHWC": [1, 2], "NLC": [1]}[layout]
        factory = {"bias": bias, "device": device, "dtype": dtype}
        if layout == "NCHW":
            self.fc1: nn.Module = nn.Conv2d(channels, rd_channels, 1, **factory)
            self.fc2: nn.Module = nn.Conv2d(rd_channels, channels, 1, **factory)
        else:
            self.fc1 = nn.Linear(channels, rd_channels, **factory)
            self.fc2 = nn.Linear(rd_channels, channels, **factory)
        self.act = create_act_layer(act_layer, inplace=True)
        self.gate = create_act_layer(gate_layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        s = squeeze(x, self.dims)
        s = self.fc2(self.act(self.fc1(s)))
        g: torch.Tensor = self.gate(s)
        if self.gain != 1.0:
            g = g * self.gain
        return scale(x, g, self.dims)

    def first_layer(self) -> nn.Module:
        return self.fc1

    def last_layer(self) -> nn.Module:
        return self.fc2

    def extra_repr(self) -> str:
        return f"{self.channels}, layout={self.layout}, gain={self.gain:g}"


class EfficientNetSqueezeExcite(SqueezeExcite):
    """The same block under EfficientNet's names: ``conv_reduce``, ``act1``, ``conv_expand``, ``gate``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        modules = self._modules
        self.act1: nn.Module
        self.conv_reduce: nn.Module
        self.conv_expand: nn.Module
        renamed = {"conv_reduce": modules["fc1"], "act1": modules["act"], "conv_expand": modules["fc2"],
                   "gate": modules["gate"]}
        modules.clear()
        modules.update(renamed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        s = squeeze(x, self.dims)
        s = self.conv_expand(self.act1(self.conv_reduce(s)))
        g: torch.Tensor = self.gate(s)
        if self.gain != 1.0:
            g = g * self.gain
        return scale(x, g, self.dims)

    def first_layer(self) -> nn.Module:
        return self.get_submodule("conv_reduce")

    def last_layer(self) -> nn.Module:
        return self.get_submodule("conv_expand")


def squeeze_width(config: SEConfig, base: int, from_input: bool = False) -> int:
    """The squeeze width, from `base` channels; `from_input` says that those are an inverted residual's input."""
    if config.rd_channels is not None:
        return config.rd_channels
    ratio = config.ratio if config.ratio is not None else 1 / 4 if from_input else 1 / 16
    divisor = config.rd_divisor if config.rd_divisor is not None else 1 if from_input else 8
    return _divisible(base * ratio, divisor)


def _divisible(value: float, divisor: int) -> int:
    """The multiple of `divisor` nearest to `value`, at least one `divisor`; a divisor of 1 rounds as Python does."""
    if divisor == 1:
        return max(1, round(value))
    return max(divisor, int(value + divisor / 2) // divisor * divisor)


def make_se(
    channels: int, rd_channels: int, layout: str, style: str, config: SEConfig, act: str | type[nn.Module] | None,
    outer_gain: float, device: Any, dtype: Any,
) -> SqueezeExcite:  # fmt: skip
    """Build a block. `act` is the site's own activation, `outer_gain` a factor that the model puts behind it.

    Raises:
        ConfigError: ``init="identity"`` with a gate that cannot be 1, or a name that timm does not know.
    """
    gate_layer = config.gate_layer or "sigmoid"
    gain = 1.0 if config.init == "timm" else identity_gain(gate_layer) / outer_gain
    cls = EfficientNetSqueezeExcite if style == "efficientnet" else SqueezeExcite
    try:
        block = cls(
            channels, rd_channels, layout, config.bias, config.act_layer or act or "relu", gate_layer, gain, device, dtype)
    except (KeyError, AssertionError, TypeError) as error:
        raise ConfigError(
            f"act_layer={config.act_layer!r}, gate_layer={gate_layer!r}: timm cannot create it ({error!r}); "
            "use a name of timm.layers.create_act, such as 'relu', 'silu', 'sigmoid'") from error
    if config.init == "identity":
        mirror(block.first_layer())
        for parameter in block.last_layer().parameters():
            nn.init.zeros_(parameter)
    return block
