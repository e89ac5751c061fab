"""Which module owns a unit, and which sums and concatenations around units are none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import se_inject

from ..support.toys import Net, conv
from ..support.units import (
    Encoded,
    Nested,
    Residual,
    Toy,
)


class Stage(Toy):
    """CSPNet: a concat around residual blocks is a stage, and the blocks are the units."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Residual(), Residual())

    def forward(self, x):
        return torch.cat([self.a(x), self.blocks(x)], 1)


class Collected(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = conv(16, 16), conv(16, 16)

    def forward(self, x):
        y = self.one(x)
        return torch.cat([x, y, self.two(y)], 1)


class Fused(Toy):
    """VoVNet: a child returns the concat, and its caller fuses it."""

    def __init__(self):
        super().__init__()
        self.collect, self.fuse = Collected(), conv(48, 16)

    def forward(self, x):
        return self.fuse(self.collect(x))


class LongSkip(Toy):
    """EDSR: a skip around a stage of residual blocks is no unit of its own."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(Residual(), Residual(), nn.Conv2d(16, 16, 3, padding=1))

    def forward(self, x):
        return x + self.body(x)


class Streams(Toy):
    """TNT: a stream that goes on by itself is gated too, although another is computed from it."""

    def forward(self, x):
        p = x + self.a(x)
        return p, x + self.b(self.c(p))


class Both(Encoded):
    """A linear sum beside a real branch changes no name."""

    def forward(self, x):
        x = x + self.b(x)
        return x + self.c(x)


@pytest.mark.parametrize("toy, paths", [
    (Nested, ["unit.branch.se"]), (Stage, ["unit.blocks.0.se", "unit.blocks.1.se"]), (Fused, ["unit.se"]),
    (Both, ["unit.se"]), (LongSkip, ["unit.body.0.se", "unit.body.1.se"])])  # fmt: skip
def test_owners(toy, paths):
    model = Net(toy()).eval()
    x = torch.randn(2, 3, 8, 8)
    before = model(x)
    assert [s.path for s in se_inject.plan(model, input_size=(3, 8, 8)).sites] == paths
    assert torch.equal(se_inject.inject(model, input_size=(3, 8, 8))(x), before)


def test_two_streams():
    model = nn.Sequential(nn.Conv2d(3, 16, 1), Streams())
    plan = se_inject.plan(model, input_size=(3, 8, 8))
    assert [(s.path, s.kind) for s in plan.sites] == [("1.se1", "residual"), ("1.se2", "residual")]


def test_a_module_called_twice():
    """One owner, one block: both calls go through it. A child called twice is gated where its branch ends."""
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.unit = nn.Conv2d(3, 16, 1), Residual()

        def forward(self, x):
            return self.unit(self.unit(self.stem(x))).mean((2, 3))

    class Shared(Toy):
        def forward(self, x):
            return x + self.b(self.a(self.a(x)))

    x = torch.randn(2, 3, 8, 8)
    for model in (Twice(), Net(Shared())):
        model.eval()
        before = model(x)
        plan = se_inject.plan(model, input_size=(3, 8, 8))
        assert [s.path for s in plan.sites] == ["unit.se"]
        se_inject.inject(model, input_size=(3, 8, 8))
        assert torch.equal(model(x), before)
    calls = []
    twice = se_inject.inject(Twice(), input_size=(3, 8, 8))
    twice.unit.se.register_forward_hook(lambda *a: calls.append(1))
    twice(x)
    assert len(calls) == 2
