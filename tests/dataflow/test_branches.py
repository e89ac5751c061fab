"""Forwards that branch: on sizes each branch is rewritten, on values none."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from timm.layers import DropPath
from torch import nn

import se_inject

from ..support.checks import check_identity
from ..support.residual import Network, Unit
from ..support.toys import conv


class Branching(nn.Module):
    """Pads where the size is no multiple of the window, as window attention does."""

    def __init__(self):
        super().__init__()
        self.window = 4
        self.work = conv(16, 16)
        self.drop_path = DropPath(0.5)

    def forward(self, x):
        assert x.shape[1] == 16, "wrong width"
        h, w = x.shape[2:]
        pad_h, pad_w = -h % self.window, -w % self.window
        y = x
        if pad_h > 0 or pad_w > 0:
            y = nn.functional.pad(y, (0, pad_w, 0, pad_h))
        y = self.work(y)
        if pad_h > 0 or pad_w > 0:
            y = y[:, :, :h, :w].contiguous()
        return x + self.drop_path(y)


@pytest.mark.parametrize("side", [18, 20])  # the unit sees 16 or 18: without and with padding
def test_a_forward_that_branches_on_sizes(side):
    model = Network(Branching())
    check_identity(model, (3, side, side))
    base = copy.deepcopy(model).eval()
    se_inject.inject(model.eval(), input_size=(3, side, side))
    for other in (18, 20, 23):
        x = torch.randn(2, 3, other, other)
        with torch.no_grad():
            assert torch.equal(model(x), base(x))
    calls = []
    handle = model.units[0].se.register_forward_hook(lambda *a: calls.append(1))
    model(torch.randn(2, 3, 18, 18))
    model(torch.randn(2, 3, 20, 20))
    handle.remove()
    assert len(calls) == 2
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    x = torch.randn(2, 3, 23, 23)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    with pytest.raises(se_inject.SEInjectError, match="wrong width"):
        model.units[0](torch.randn(1, 8, 16, 16))


class OnValues(Unit):
    def forward(self, x):
        y = self.b(self.a(x))
        return x + y if y.sum() > 0 else x - y


def test_a_forward_that_branches_on_values_is_refused():
    model = Network(Unit(), OnValues())
    made = se_inject.plan(model, input_size=(3, 16, 16))  # it cannot run without values
    assert [s.path for s in made.sites] == ["units.0.se"] and "ended in units.1" in made.ended
    assert type(model.units[1]) is OnValues


class Early(Unit):
    def forward(self, x):
        if x.shape[-1] < 4:
            return x
        return x + self.b(self.a(x))


class Commuted(Branching):
    """The operands of the sum change places between the branches."""

    def forward(self, x):
        if x.shape[2] % 2 == 0:
            return self.work(x) + x
        return x + self.work(nn.functional.pad(x, (0, 1, 0, 1)))[:, :, :-1, :-1]


@pytest.mark.parametrize("unit, sides", [(Early, (18, 5)), (Commuted, (18, 19))])
def test_branches_that_differ(unit, sides):
    model = Network(unit()).eval()
    se_inject.inject(model, input_size=(3, sides[0], sides[0]))
    shut = copy.deepcopy(model)
    shut.units[0].se.gain = 0.0
    for side in sides:
        x = torch.randn(2, 3, side, side)
        with torch.no_grad():
            assert torch.equal(shut(x), model.head(model.stem(x).mean((2, 3))))  # only the branch is gated
