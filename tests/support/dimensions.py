"""Small networks for signals, images and volumes."""

from __future__ import annotations

from torch import nn


class Unit(nn.Module):
    """A residual unit on (N, 8, L), (N, 8, H, W) or (N, 8, D, H, W)."""

    def __init__(self, n=2):
        super().__init__()
        conv = getattr(nn, f"Conv{n}d")
        self.conv1, self.norm, self.conv2 = conv(8, 8, 3, padding=1), getattr(nn, f"BatchNorm{n}d")(8), conv(8, 8, 1)

    def forward(self, x):
        return x + self.conv2(self.norm(self.conv1(x)).relu())


class Plain(nn.Sequential):
    def __init__(self, n=2):
        conv, norm = getattr(nn, f"Conv{n}d"), getattr(nn, f"BatchNorm{n}d")
        super().__init__(conv(2, 8, 3), norm(8), nn.ReLU(), conv(8, 8, 3), norm(8), nn.ReLU())


def residual(n=2):
    return nn.Sequential(getattr(nn, f"Conv{n}d")(2, 8, 3), Unit(n), Unit(n))
