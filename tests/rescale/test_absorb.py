"""Which weights take in a constant factor on a value, and why others do not."""

import re

import pytest
import torch
import torch.nn.functional as F
from timm.layers import SEModule
from torch import nn

from se_inject.errors import Refusal
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
        except Refusal as error:
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


class Pair(nn.Module):
    """A layer that returns a map together with something else."""

    def forward(self, hidden):
        return hidden * 2, None


class Parent(nn.Module):
    """A head that reads the weights of its linear layer and does not call it."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 2)

    def forward(self, x):
        return F.linear(x, self.fc.weight, self.fc.bias)


class Head(nn.Module):
    """A linear layer, used by a function of the module and its input."""

    def __init__(self, forward):
        super().__init__()
        self.fc, self.by = nn.Linear(8, 2), forward

    def forward(self, x):
        return self.by(self, x)


def without_a_layer(m, x):
    return x.mean((2, 3)) if x.shape[-1] < 4 else m.fc(x.mean((2, 3)))


def untraceable(m, x):
    if x.shape[-1] < 4:
        x = x / float(x.abs().max())
    return m.fc(x.mean((2, 3)))


def by_another_number(m, x):
    return m.fc(x.mean((2, 3)).roll(1 if x.shape[-1] > 8 else 2, 1))


def by_another_number_of_sizes(m, x):
    return m.fc(x.mean((2, 3)).roll(x.shape[1] // 2 if x.shape[-1] > 8 else x.shape[1] // 4, 1))


def with_another_term(m, x):
    return m.fc((x + 0 if x.shape[-1] > 8 else x + 1).mean((2, 3)))


def transposed(m, x):
    x = x.mean((2, 3))
    return m.fc(x) if x.shape[0] < 8 else m.fc(x) + x.T.sum()


def refused(m, x):
    if x.shape[-1] < 4:
        raise ValueError("too small")
    return m.fc(x.mean((2, 3)))


class Unit(Toy):
    """A convolution before its SE, of which the forward around it may call the convolution alone."""

    def __init__(self):
        super().__init__(lambda m, x: m.se(m.conv1(x).relu()))


def past_the_unit(m, x):
    return m.conv2(m.unit.conv1(x) if x.shape[-1] < 8 else m.unit(x))


def past_the_unit_by_weight(m, x):
    y = m.unit(x)
    return m.conv2(y * m.unit.conv1.bias.sum() if x.shape[-1] < 8 else y)


def past_the_unit_in_training(m, x):
    return (m.unit(x), m.conv2(m.unit.conv1(x))) if m.training else m.unit(x)


def with_features(m, x):
    f = m.se(F.gelu(m.conv1(x)))
    y = m.fc(f.mean((2, 3)))
    return (y, f) if m.training else y


def with_a_head_for_large_maps(m, x):
    f = m.se(F.gelu(m.conv1(x)))
    y = m.fc(f.mean((2, 3)))
    if m.training and f.shape[-1] > 4:
        y = y + m.second(f.mean((2, 3)))
    return y


def with_dropout(m, x):
    f = m.se(F.gelu(m.conv1(x))).mean((2, 3))
    return m.fc(m.drop(f) if m.training else f)


def with_a_second_head(m, x):
    y = m.se(F.gelu(m.conv1(x))).mean((2, 3))
    return (m.fc(y), m.second(y)) if m.training else m.fc(y)


def with_a_second_head_for_the_input(m, x):
    y = m.se(F.gelu(m.conv1(x))).mean((2, 3))
    return (m.fc(y), m.second(x.mean((2, 3)))) if m.training else m.fc(y)


def past_a_layer(m, x):
    return m.unit(x) if x.shape[-1] < 8 else m.conv2(m.unit(x))


def both(m, x):
    y = m.conv1(x).sigmoid()
    return m.head(m.se(y).mean((2, 3))) + m.head(x.mean((2, 3)))


def padded(m, x):
    y = m.conv1(x)
    if x.shape[-1] % 7:
        y = F.pad(y, (0, 1))
    return m.se(y)


UP, DOWN = {"conv1.weight", "conv1.bias"}, {"conv2.weight"}


@pytest.mark.parametrize("toy, expected", [
    (Toy(lambda m, x: m.se(m.conv1(x).relu())), UP),
    (Toy(lambda m, x: m.se(m.pool(m.conv1(x).permute(0, 2, 3, 1).permute(0, 3, 1, 2))), pool=nn.MaxPool2d(2)), UP),
    (Toy(lambda m, x: m.se(m.norm(m.conv1(x))), norm=nn.BatchNorm2d(8)), {"norm.weight", "norm.bias"}),
    (Toy(lambda m, x: m.se(m.norm(m.conv1(x))), norm=nn.GroupNorm(2, 8)), {"norm.weight", "norm.bias"}),
    (Toy(lambda m, x: m.se(m.norm(m.conv1(x))), norm=nn.BatchNorm2d(8, affine=False)), "norm"),
    (Toy(lambda m, x: m.conv2(m.se(F.silu(m.conv1(x))).relu())), DOWN),
    (Toy(lambda m, x: m.conv2(F.pad(m.se(x), (1, 1, 1, 1)))), DOWN),
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
    (Toy(lambda m, x: m.se(m.pair(hidden=m.conv1(x))[0]), pair=Pair()), "comes out of pair together with others"),
    (Toy(lambda m, x: m.fc(m.se(x).flatten(2).mean(x.dim() - 2)), fc=nn.Linear(8, 2)), {"fc.weight"}),
    (Toy(lambda m, x: m.fc(F.avg_pool1d(m.se(x).mean((2, 3)), 2)), fc=nn.Linear(4, 2)), "mixed by avg_pool1d"),
    (Toy(lambda m, x: m.fc(F.avg_pool1d(m.se(x).mean((2, 3)), 3, 1, 1)), fc=nn.Linear(8, 2)), "mixed by avg_pool1d"),
    (Toy(both, head=Parent()), "used more than once"),
    (Toy(lambda m, x: m.head(m.se(x).mean((2, 3))), head=Parent()), {"head.fc.weight"}),
])  # fmt: skip
def test_where_a_factor_goes(toy, expected):
    found = into(toy.eval())
    assert (found == expected) if isinstance(expected, set) else (
        isinstance(found, str) and re.search(expected, found)), found


@pytest.mark.parametrize("forward, expected", [
    *((f, "branches on sizes") for f in (
        without_a_layer, untraceable, by_another_number, by_another_number_of_sizes, with_another_term, transposed)),
    (refused, {"head.fc.weight"})])
def test_layers_in_a_forward_that_branches(forward, expected):
    found = into(Toy(lambda m, x: m.head(m.se(F.gelu(m.conv1(x)))), head=Head(forward)).eval())
    assert found == expected if isinstance(expected, set) else re.search(expected, str(found)), found


@pytest.mark.parametrize("forward, expected", [
    (past_the_unit, "unit.conv1.weight is used more than once"), (past_the_unit_by_weight, "unit.conv1.bias is used more than"),
    (past_the_unit_in_training, "unit.conv1.weight is used more than once"),
    (past_a_layer, {"unit.conv1.weight", "unit.conv1.bias"})])
def test_layers_that_another_branch_calls_without_the_block(forward, expected):
    found = into(Toy(forward, unit=Unit()).eval(), path="unit.se")
    assert found == expected if isinstance(expected, set) else re.search(expected, str(found)), found


@pytest.mark.parametrize("forward, expected", [
    (with_a_second_head, "does something else in train mode"), (with_a_second_head_for_the_input, {"fc.weight"}),
    (with_features, "does something else in train mode"), (with_a_head_for_large_maps, "does something else in train mode"),
    (with_dropout, {"fc.weight"})])
def test_heads_of_train_mode(forward, expected):
    found = into(Toy(forward, fc=nn.Linear(8, 2), second=nn.Linear(8, 2), drop=nn.Dropout(0.5)).eval())
    assert found == expected if isinstance(expected, set) else re.search(expected, str(found)), found


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
    lambda m, x: m.conv2(F.pixel_unshuffle(m.se(x), 2)[:, ::4].repeat(1, 1, 2, 2)),
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
