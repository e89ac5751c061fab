"""Forwards that draw random numbers in train mode, without a module for it."""

from __future__ import annotations

import copy
import functools
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
from timm.layers import drop_path
from torchvision.ops import stochastic_depth

import se_inject

from ..support.residual import Network, Unit

P = 0.4


def drop_connect(inputs, p, training):
    """That of efficientnet_pytorch."""
    assert 0 <= p <= 1
    if not training:
        return inputs
    keep_prob = 1 - p
    random_tensor = keep_prob
    random_tensor += torch.rand([inputs.shape[0], 1, 1, 1], dtype=inputs.dtype, device=inputs.device)
    return inputs / keep_prob * torch.floor(random_tensor)


def _mask(x, p):
    return (torch.rand_like(x[:, :1, :1, :1]) >= p).to(x.dtype)


def masked(x, p):
    return x * _mask(x, p)


class Drawing(Unit):
    def drop(self, x):
        if self.training:
            return x * x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(1 - P) / (1 - P)
        return x


class Connect(Drawing):
    def forward(self, x):
        return x + drop_connect(self.b(self.a(x)), p=P, training=self.training)


class IfTraining(Drawing):
    def forward(self, x):
        y = self.b(self.a(x))
        if self.training:
            y = masked(y, P)
        return y + x


class Inlined(Drawing):
    def forward(self, x):
        y = self.b(self.a(x))
        if self.training and P > 0:
            keep = torch.rand(y.shape[0], 1, 1, 1, dtype=y.dtype, device=y.device) >= P
            y = y * keep / (1 - P)
        return x + y


def noisy(x, training):
    return x + torch.normal(torch.zeros(1), 0.1) if training else x


class Noisy(Drawing):
    """Its function draws by an operator that drops nothing."""

    def forward(self, x):
        return x + noisy(self.b(self.a(x)), self.training)


class Method(Drawing):
    def forward(self, x):
        return x + self.drop(self.b(self.a(x)))


class Shortcut(Drawing):
    def forward(self, x):
        return self.drop(x) + self.b(self.a(x))


class Dropouts(Drawing):
    def forward(self, x):
        y = self.b(F.dropout(self.a(F.dropout2d(x, P, self.training)), P, training=self.training))
        return x + F.dropout(y, P, self.training, inplace=False)


class Timms(Drawing):
    def forward(self, x):
        return x + drop_path(self.b(self.a(x)), P, self.training)


class Torchvisions(Drawing):
    def forward(self, x):
        return stochastic_depth(self.b(self.a(x)), P, "row", self.training) + x


class Sizes(Drawing):
    """It asks for a size, too."""

    def forward(self, x):
        y = self.a(x)
        if x.shape[2] > 8:
            y = F.dropout(y, P, self.training)
        return x + drop_connect(self.b(y), P, self.training)


class InPlace(Drawing):
    """All readers of the branch, and not the shortcut alone, see what is written into it."""

    def forward(self, x):
        y = self.b(self.a(x))
        if self.training:
            y.mul_(torch.rand_like(y))
        return x + F.dropout(y, P, self.training, inplace=True) + y.mean()


class Read(Drawing):
    """The gated value has another reader, which gets it as it was."""

    def forward(self, x):
        y = self.a(x)
        return x + drop_connect(self.b(y), P, self.training) + 0.1 * F.dropout(y, P, self.training)


UNITS = [Connect, IfTraining, Inlined, Noisy, Method, Shortcut, Dropouts, Timms, Torchvisions, Sizes, Read]


def outputs(model, x, training):
    """Of a copy, because a call in train mode moves statistics."""
    torch.manual_seed(3)
    return copy.deepcopy(model).train(training)(x)


@pytest.mark.parametrize("unit, placement", [
    *((unit, "auto") for unit in UNITS), *((unit, p) for unit in (Connect, Read) for p in ("post", "pre", "inner"))])
def test_both_modes_are_rewritten(unit, placement):
    base = Network(unit(), unit())
    model = copy.deepcopy(base)
    x = torch.randn(6, 3, 16, 16)
    se_inject.inject(model, input_size=(3, 16, 16), placement=placement)
    assert len(se_inject.block_paths(model)) in (2, 4)
    for training in (False, True):
        expected = outputs(base, x, training)
        assert torch.equal(outputs(model, x, training), expected)
    assert not torch.equal(model.train()(x), expected)  # it draws again
    model.load_state_dict(base.state_dict())
    assert torch.equal(outputs(model, x[:2], True), outputs(base, x[:2], True))

    with torch.no_grad():
        for p in se_inject.se_parameters(model):
            p.normal_()
    trained = outputs(model, x, True)
    assert not torch.equal(trained, expected)
    assert torch.equal(outputs(pickle.loads(pickle.dumps(model)), x, True), trained)
    copied = copy.deepcopy(model)
    copied(x).sum().backward()
    assert all(p.grad is not None for p in se_inject.se_parameters(copied))
    assert torch.equal(outputs(se_inject.eject(model), x, True), expected)


def test_an_optimized_copy():
    base = Network(Connect(), Dropouts())
    x = torch.randn(6, 3, 16, 16)
    model = se_inject.inject(copy.deepcopy(base), input_size=(3, 16, 16))
    fast = se_inject.optimize_for_inference(model.eval(), input_size=(3, 16, 16))
    assert torch.allclose(fast(x), base.eval()(x), atol=1e-5)


def test_the_block_is_before_what_drops():
    """As for modules: the squeeze sees the branch as it is, and a dropped branch is zero."""
    model = se_inject.inject(Network(Connect()), input_size=(3, 16, 16)).train()
    seen = []
    model.units[0].se.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    model(torch.randn(64, 3, 16, 16))
    assert all(row.any() for row in seen[0])


def test_torchscript_and_compile():
    x = torch.randn(6, 3, 16, 16)
    for units, make in (((Dropouts(), Torchvisions()), torch.jit.script),
                        ((Connect(), IfTraining()), functools.partial(torch.compile, backend="eager", fullgraph=True))):
        model = se_inject.inject(Network(*units), input_size=(3, 16, 16))
        made = make(model)
        for training in (False, True):
            expected = outputs(model, x, training)
            torch.manual_seed(3)
            assert torch.equal(made.train(training)(x), expected)


class Generator(Drawing):
    def __init__(self):
        super().__init__()
        self.random = random.Random(0)

    def forward(self, x):
        y = self.b(self.a(x))
        if self.training and self.random.random() < P:
            y = F.dropout(y, P)
        return x + y


class Hidden(Drawing):
    def forward(self, x):
        y = self.b(self.a(x))
        return x + (y * STATE[0].random() if self.training else y)


class Early(Drawing):
    def forward(self, x):
        if self.training and torch.rand(1) < P:
            return x
        return x + self.b(self.a(x))


class ReadInPlace(Drawing):
    """The gated value has another reader, which sees what is written into it."""

    def forward(self, x):
        y = self.a(x)
        z = x + self.b(y)
        if self.training:
            y.mul_(torch.rand_like(y))
        return z + 0.1 * y


class ViewInPlace(Drawing):
    """A view of the gated value is written into."""

    def forward(self, x):
        y = self.b(self.a(x))
        F.dropout(y.flatten(2), P, self.training, True)
        return x + y + y.mean((2, 3), keepdim=True)


class ModeOfALayer(Drawing):
    """The layer may be frozen in eval mode while its owner trains."""

    def forward(self, x):
        return x + F.dropout(self.b(self.a(x)), P, self.b.training)


class ModeOfANorm(Drawing):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(16)

    def forward(self, x):
        n = self.norm
        return x + F.batch_norm(self.b(self.a(x)), n.running_mean, n.running_var, n.weight, n.bias, n.training)


class Scaled(Drawing):
    def forward(self, x):
        y = self.b(self.a(x))
        return x + (y * 0.5 if self.training else y)


class Other(Drawing):
    def forward(self, x):
        return x + (F.dropout(self.b(x)) if self.training else self.b(self.a(x)))


STATE = [random.Random(0)]


@pytest.mark.parametrize("unit, reason", [
    (Generator, "random numbers"), (Hidden, "something else than to draw|random numbers"), (Early, "other branches"),
    (Scaled, "something else than to draw"), (InPlace, "the place of 'se'"), (ReadInPlace, "the place of 'se1'"),
    (ViewInPlace, "the place of 'se'"), (ModeOfALayer, "the mode of a layer"), (ModeOfANorm, "the mode of a layer"),
    (Other, "other layers")])
def test_what_else_differs_is_refused(unit, reason):
    model = Network(unit())
    with pytest.raises(se_inject.NoSitesError, match=reason):
        se_inject.inject(model, input_size=(3, 16, 16))
    assert type(model.units[0]) is unit
