"""Gather-excite over the whole map, which timm 1.0.31 declares but cannot create.

timm's ``GatherExcite`` passes device and dtype to its mlp by position, and the mlp rejects them. This class creates the
mlp itself, and without the two, which the mlp of timm 1.0.15 does not know; keys and forward are timm's.
Source: Hu et al., Gather-Excite, arXiv 1810.12348.
"""

from __future__ import annotations

from timm.layers import ConvMlp, get_act_layer, make_divisible
from timm.layers import GatherExcite as TimmGatherExcite
from torch import nn


class GatherExcite(TimmGatherExcite):  # type: ignore[misc]
    """Scales each channel by a gate, computed from the means of all channels. Shape: (N, C, H, W) to (N, C, H, W)."""

    def __init__(
        self, channels: int, rd_ratio: float = 1 / 16, rd_channels: int | None = None, rd_divisor: int = 1,
        act_layer: str | type[nn.Module] = "relu", gate_layer: str = "sigmoid",
    ) -> None:  # fmt: skip
        super().__init__(channels, use_mlp=False, gate_layer=gate_layer)
        width = rd_channels or make_divisible(channels * rd_ratio, rd_divisor, round_limit=0.0)
        self.mlp = ConvMlp(channels, width, act_layer=get_act_layer(act_layer))
