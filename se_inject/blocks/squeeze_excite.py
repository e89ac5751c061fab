"""The squeeze-and-excitation block, and its squeeze width.

Source: Hu et al., Squeeze-and-Excitation Networks, arXiv 1709.01507, section 3; keys as in timm's SEModule (``fc1``,
``fc2``) and EfficientNet's SqueezeExcite (``conv_reduce``, ``conv_expand``).
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import create_act_layer
from torch import nn

from ..config import SEConfig
from .autograd import scale, squeeze
from .identity import HasGain

CONVS: dict[str, type[nn.Module]] = {"NCL": nn.Conv1d, "NCHW": nn.Conv2d, "NCDHW": nn.Conv3d}  # where channels come first
LAYOUTS = (*CONVS, "NLC", "NHWC", "NDHWC")


class SqueezeExcite(HasGain):
    """Squeeze-and-excitation: scales each channel by a gate, computed from the means of all channels.

    Args:
        channels: Number of channels C of the input.
        rd_channels: Squeeze width.
        layout: ``NCHW``, ``NCL`` or ``NCDHW`` (1x1 convolutions); ``NHWC``, ``NLC`` or ``NDHWC`` (linear layers).
        bias: Whether the two layers have a bias.
        act_layer: Activation, by timm's name, or its class.
        gate_layer: Gate function, by timm's name.
        gain: Constant factor of the gate.

    Shape: as `layout` says, (N, C, H, W) for ``NCHW``. The output has the shape of the input.
    """

    def __init__(
        self, channels: int, rd_channels: int, layout: str = "NCHW", bias: bool = True,
        act_layer: str | type[nn.Module] = "relu",
        gate_layer: str = "sigmoid", gain: float = 1.0, device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(gain)
        self.channels = channels
        self.layout = layout
        self.dims = [axis for axis, letter in enumerate(layout) if letter not in "NC"]
        factory = {"bias": bias, "device": device, "dtype": dtype}
        reduce: nn.Module
        expand: nn.Module
        if layout in CONVS:
            conv = CONVS[layout]
            reduce, expand = conv(channels, rd_channels, 1, **factory), conv(rd_channels, channels, 1, **factory)
        else:
            reduce, expand = nn.Linear(channels, rd_channels, **factory), nn.Linear(rd_channels, channels, **factory)
        self._register(reduce, create_act_layer(act_layer, inplace=True), expand, create_act_layer(gate_layer))

    def _register(self, reduce: nn.Module, act: nn.Module, expand: nn.Module, gate: nn.Module) -> None:
        self.fc1, self.act, self.fc2, self.gate = reduce, act, expand, gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        s = squeeze(x, self.dims)
        s = self.fc2(self.act(self.fc1(s)))
        g: torch.Tensor = self.gate(s)
        if self.gain != 1.0:
            g = g * self.gain
        return scale(x, g, self.dims)

    def extra_repr(self) -> str:
        return f"{self.channels}, layout={self.layout}, gain={self.gain:g}"


class EfficientNetSqueezeExcite(SqueezeExcite):
    """The same block under EfficientNet's names: ``conv_reduce``, ``act1``, ``conv_expand``, ``gate``."""

    def _register(self, reduce: nn.Module, act: nn.Module, expand: nn.Module, gate: nn.Module) -> None:
        self.conv_reduce, self.act1, self.conv_expand, self.gate = reduce, act, expand, gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        s = squeeze(x, self.dims)
        s = self.conv_expand(self.act1(self.conv_reduce(s)))
        g: torch.Tensor = self.gate(s)
        if self.gain != 1.0:
            g = g * self.gain
        return scale(x, g, self.dims)


def squeeze_width(config: SEConfig, base: int, from_input: bool = False) -> int:
    """The squeeze width that `config` gives for `base` channels.

    `from_input` says that `base` counts the input channels of an inverted residual, for which EfficientNet has another
    ratio and no rounding.
    """
    if config.rd_channels is not None:
        return config.rd_channels
    ratio = config.ratio if config.ratio is not None else 1 / 4 if from_input else 1 / 16
    divisor = config.rd_divisor if config.rd_divisor is not None else 1 if from_input else 8
    if divisor == 1:  # as EfficientNet rounds
        return max(1, round(base * ratio))
    return max(divisor, int(base * ratio + divisor / 2) // divisor * divisor)
