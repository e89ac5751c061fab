"""Which sums and concatenations get a block, and where it is, on toys that carry their own expected result."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import se_inject
from se_inject.blocks.squeeze_excite import SqueezeExcite

from ..support.toys import Net
from ..support.units import (
    TOYS,
    Concat,
    Dense,
    DualPath,
    Encoded,
    Gated,
    InPlace,
    LastLayout,
    Partial,
    Position,
    Projection,
    Residual,
    Scaled,
    Shuffled,
    Stacked,
    Toy,
    TwoBranches,
)


@pytest.mark.parametrize("toy", [*TOYS, Gated])
def test_sites(toy):
    plan = se_inject.plan(Net(toy()), input_size=(3, 8, 8))
    assert tuple((s.slot, s.kind, s.channels) for s in plan.sites) == toy.expected
    assert all(s.owner == "unit" for s in plan.sites)


@pytest.mark.parametrize("toy", TOYS)
def test_gate_is_where_the_plan_says(toy):
    """With every gate shut, only what the plan leaves ungated is left of the unit; at identity all of it is."""
    model = Net(toy()).eval()
    x = torch.randn(2, 3, 8, 8)
    before = model(x)
    se_inject.inject(model, input_size=(3, 8, 8))
    assert torch.equal(model(x), before)
    seen = []
    for m in model.modules():
        if isinstance(m, SqueezeExcite):
            m.register_forward_hook(lambda mod, args, out: seen.append(torch.equal(args[0], out)))
    model(x)
    assert seen == [True] * len(toy.expected)
    for m in model.modules():
        if isinstance(m, SqueezeExcite):
            m.gain = 0.0
    u, s = model.unit, model.stem(x)
    zero = {  # the unit's value with the branch gone
        Residual: lambda: torch.relu(s), InPlace: lambda: torch.relu(s), Scaled: lambda: s,
        Projection: lambda: u.down(s), TwoBranches: lambda: s,
        Partial: lambda: torch.cat([s, torch.zeros_like(s)], 1),
        Concat: lambda: torch.zeros(2, 32, 8, 8), Dense: lambda: torch.cat([s, torch.zeros_like(s)], 1),
        Shuffled: lambda: torch.cat([s[:, :8], torch.zeros_like(s[:, 8:])], 1),
        DualPath: lambda: torch.cat([s, torch.zeros_like(s[:, 12:])], 1), Stacked: lambda: s, LastLayout: lambda: s,
        Position: lambda: s + u.pos}[toy]
    assert torch.equal(model(x), zero().mean((2, 3)))


class Pooled(Toy):
    def forward(self, x):
        return self.c(x + nn.functional.avg_pool2d(x, 3, 1, 1))


@pytest.mark.parametrize("toy, reason", [(Pooled, "no convolution or linear layer"), (Encoded, "branch is linear")])
def test_a_sum_that_is_no_residual_is_said(toy, reason):
    plan = se_inject.plan(Net(toy()), input_size=(3, 8, 8))
    assert any(s.kind == "residual" and reason in s.reason for s in plan.skipped)
    assert all(s.kind != "residual" for s in plan.sites)


class NoNumbers(Toy):
    """Its maps are not of floating point: `make` gives them from one of it."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return (torch.cat([self.make(self.a(x)), self.make(self.c(x))], 1) != 0).float()


@pytest.mark.parametrize("make", [lambda y: y > 0, lambda y: (y * 255).byte(), torch.fft.fft2])
def test_a_map_of_another_dtype_is_no_place(make):
    plan = se_inject.plan(Net(NoNumbers(make)), input_size=(3, 8, 8), placement="post")
    assert not plan.sites and "which a block does not take" in plan.skipped[0].reason


class SumOfAll(Toy):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, x):
        return x * torch.stack([x, self.b(self.a(x))]).sum(**self.options).mean()


@pytest.mark.parametrize("options", [{}, {"dim": 0, "keepdim": True}])
@pytest.mark.parametrize("placement", ["auto", "post"])
def test_a_sum_of_other_axes_is_no_residual(options, placement):
    plan = se_inject.plan(Net(SumOfAll(**options)), input_size=(3, 8, 8), placement=placement)
    assert plan.sites and all(s.kind != "residual" for s in plan.all_sites)
