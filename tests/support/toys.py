"""Small modules that several tests put together."""

from __future__ import annotations

import pytest
import timm
from torch import nn


def conv(i: int, o: int, k: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, k, stride, k // 2, bias=False), nn.BatchNorm2d(o), nn.ReLU())


class Net(nn.Module):
    def __init__(self, unit):
        super().__init__()
        self.stem, self.unit = nn.Conv2d(3, 16, 1), unit

    def forward(self, x):
        return self.unit(self.stem(x)).mean((2, 3))


def needs(name: str) -> None:
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
