"""Which weights take in a constant factor on a value, and why others do not."""

import re

import pytest
import torch
from timm.layers import SEModule
from torch import nn

from se_inject.rescale.absorb import Absorber
from se_inject.rescale.gates import absorb_gate, only_call
from se_inject.surgery.session import traced

from .test_fold import images


def into(module, size=(8, 16, 16), path="se"):
    """Names of the parameters that take in the factor of the SE module at `path`, or the reason why none do."""
    with traced(module, size) as t:
        absorber = Absorber(module, t)
        try:
            return {s.key for s in absorb_gate(absorber, *only_call(absorber, module.get_submodule(path)), 1)}
        except Exception as error:
            return str(error)


class Toy(nn.Module):
    """Two convolutions, SE and further layers, called by a function of the module and its input."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.conv1, self.conv2, self.se = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1), SEModule(8)
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.by = forward

    def forward(self, x):
        return self.by(self, x)


def halves(m, x):
    a, b = m.conv1(x).relu().chunk(2, 1)
    return torch.cat([b, a], 1)


def in_place(m, x):
    y = m.se(x)
    y.mul_(m.gamma)
    return m.conv2(y)


def on_large_maps(m, x):
    y = m.se(m.conv1(x))
    return y if x.shape[-1] > 8 else y + m.conv1(x)


def padded(m, x):
    y = m.conv1(x)
    if x.shape[-1] % 7:
        y = torch.nn.functional.pad(y, (0, 1))
    return m.se(y)


UP, DOWN = {"conv1.weight", "conv1.bias"}, {"conv2.weight"}


@pytest.mark.parametrize("toy, expected", [
    (Toy(lambda m, x: m.se(m.conv1(x).relu())), UP),
    (Toy(lambda m, x: m.se(m.pool(m.conv1(x).permute(0, 2, 3, 1).permute(0, 3, 1, 2))), pool=nn.MaxPool2d(2)), UP),
    (Toy(lambda m, x: m.se(m.norm(m.conv1(x))), norm=nn.BatchNorm2d(8)), {"norm.weight", "norm.bias"}),
    (Toy(lambda m, x: m.se(m.norm(m.conv1(x))), norm=nn.GroupNorm(2, 8)), {"norm.weight", "norm.bias"}),
    (Toy(lambda m, x: m.se(m.norm(m.conv1(x))), norm=nn.BatchNorm2d(8, affine=False)), "norm"),
    (Toy(lambda m, x: m.conv2(m.se(torch.nn.functional.silu(m.conv1(x))).relu())), DOWN),
    (Toy(lambda m, x: m.conv2(torch.nn.functional.pad(m.se(x), (1, 1, 1, 1)))), DOWN),
    (Toy(lambda m, x: m.conv2(m.se(x).flip(1))), DOWN),
    (Toy(lambda m, x: m.conv2(m.se(x)) + m.conv1(m.se.bn(x)) * 0), DOWN),
    (Toy(lambda m, x: m.se(x) + x), "added to something else"),
    (Toy(lambda m, x: m.se(m.conv1(x)) + m.conv1(x)), "conv1.weight is used more than once"),
    (Toy(lambda m, x: m.se(torch.cat([m.conv1(x)[:, :4], m.conv2(x)[:, 4:]], 1))), UP | {"conv2.weight", "conv2.bias"}),
    (Toy(lambda m, x: m.se(halves(m, x))), UP),
    (Toy(lambda m, x: (lambda y: m.se(y) + y)(m.conv1(x))), "also read by add"),
    (Toy(lambda m, x: m.se(x).sigmoid()), "does not pass sigmoid"),
    (Toy(lambda m, x: m.se(1.0 / m.conv1(x))), "does not pass truediv"),
    (Toy(lambda m, x: m.se(x)), "the model's own input or output"),
    (Toy(lambda m, x: m.se(x) * m.gamma, gamma=nn.Parameter(torch.ones(8, 1, 1))), {"gamma"}),
    (Toy(lambda m, x: m.se(x) * m.gamma, gamma=nn.Parameter(torch.ones(1))), "same for several channels"),
    (Toy(lambda m, x: m.fc(m.se(x).flatten(1)), fc=nn.Linear(8 * 16 * 16, 2)), {"fc.weight"}),
    (Toy(lambda m, x: m.fc(m.se(x).mean((2, 3))), fc=nn.Linear(8, 2)), {"fc.weight"}),
    (Toy(lambda m, x: m.grouped(m.se(x)), grouped=nn.Conv2d(8, 16, 3, groups=4)), {"grouped.weight"}),
    (Toy(lambda m, x: m.conv2(m.se(m.se(x)))), "called more than once"),
    (Toy(in_place, gamma=nn.Parameter(torch.ones(8, 1, 1))), "changed in place"),
    (Toy(on_large_maps), "branches on sizes"),
    (Toy(lambda m, x: m.se(m.conv1(x)) * m.conv1.weight.mean()), "conv1.weight is used more than once"),
    (Toy(padded), "branches on sizes"),
])  # fmt: skip
def test_where_a_factor_goes(toy, expected):
    found = into(toy.eval())
    assert (found == expected) if isinstance(expected, set) else (
        isinstance(found, str) and re.search(expected, found)), found


def test_shared_weights_are_refused():
    toy = Toy(lambda m, x: m.se(m.conv1(x)) + m.other(x), other=nn.Conv2d(8, 8, 3, padding=1))
    assert into(toy.eval()) == UP
    toy.other.weight = toy.conv1.weight
    assert "shared with another module" in into(toy)


@pytest.mark.parametrize("forward", [
    lambda m, x: m.conv2(m.grouped(m.se(x))),
    lambda m, x: m.se(m.grouped(x)) + x,
    lambda m, x: m.fc(m.se(x).flatten(1)),
    lambda m, x: m.se(halves(m, x)) + x,
    lambda m, x: m.conv2(m.se(x).view(-1, 4, 2, 16, 16).transpose(1, 2).reshape(-1, 8, 16, 16)),  # channel shuffle
    lambda m, x: m.conv2(torch.nn.functional.pixel_unshuffle(m.se(x), 2)[:, ::4].repeat(1, 1, 2, 2)),
])
def test_the_scaled_weights_do_what_the_factor_does(forward):
    toy = Toy(forward, grouped=nn.Conv2d(8, 8, 3, groups=4, padding=1), fc=nn.Linear(8 * 16 * 16, 2)).double().eval()
    x, factors = images(size=(8, 16, 16)).double(), torch.rand(8, dtype=torch.float64) + 0.1
    with traced(toy, (8, 16, 16)) as t:
        absorber = Absorber(toy, t)
        scalings = absorb_gate(absorber, *only_call(absorber, toy.se), 1)
    toy.se.forward = lambda x: x * factors.view(-1, 1, 1)
    with torch.no_grad():
        expected = toy(x)
        toy.se.forward = lambda x: x
        for s in scalings:
            p = toy.get_parameter(s.key)
            p.copy_(s.scale(p, factors))
        assert torch.allclose(toy(x), expected, rtol=1e-10, atol=1e-12)
