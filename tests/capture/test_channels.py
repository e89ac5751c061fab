"""Which axis of a tensor has the channels."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import se_inject

from ..support.toys import needs


@pytest.mark.parametrize("size", [(3, 12, 12), (3, 32, 24), (3, 24, 32), (3, 32, 48), (3, 64, 32)])
@pytest.mark.parametrize("name", ["test_convnext", "resnet18", "test_byobnet", "edgenext_xx_small", "fasternet_t0"])
def test_channels_are_told_from_height_and_width(name, size):
    """At some of these sizes a map has as many rows or columns as channels."""
    needs(name)
    options = {"existing": "stack"} if name == "test_byobnet" else {}
    square = se_inject.plan(name, input_size=(3, 256, 256), **options)
    other = se_inject.plan(name, input_size=(3, 8 * size[1], 8 * size[2]), **options)
    assert [(s.path, s.layout, s.channels, s.stage) for s in other.sites] == [
        (s.path, s.layout, s.channels, s.stage) for s in square.sites]


class BatchSecond(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.attn = nn.Conv2d(3, 16, 4, 4), nn.MultiheadAttention(16, 2)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x).flatten(2).permute(2, 0, 1)  # (L, N, C)
        y = self.norm(x)
        return self.head((x + self.attn(y, y, y)[0]).mean(0))


def test_the_batch_is_never_squeezed():
    plan = se_inject.plan(BatchSecond(), input_size=(3, 32, 32))
    assert not plan.sites and "the batch is not the first axis" in plan.skipped[0].reason


def test_sequences_of_channels_first():
    class Wave(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b = nn.Conv1d(3, 16, 3), nn.Conv1d(16, 16, 3, padding=1), nn.Conv1d(16, 16, 1)

        def forward(self, x):
            x = self.stem(x.flatten(2))
            return x + self.b(torch.relu(self.a(x)))

    (site,) = se_inject.plan(Wave(), input_size=(3, 8, 8)).sites
    assert (site.layout, site.channels, site.size) == ("NCL", 16, (62,))
