"""The generated forward is called wherever the author's is."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import se_inject
from se_inject.errors import SEInjectError
from se_inject.surgery.state import block_paths

from ..support.checks import randomise
from ..support.versions import needs_intermediates


@needs_intermediates
def test_another_way_in_does_not_miss_the_block():
    """XceptionModule is also called by forward_with_tap, where features are taken."""
    base = randomise(timm.create_model("xception41")).eval()
    model = se_inject.inject(copy.deepcopy(base))
    calls = []
    for path in block_paths(model):
        model.get_submodule(path).register_forward_hook(lambda *a, path=path: calls.append(path))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        model.forward_features(x)
        through_forward, calls[:] = list(calls), []
        features = model.forward_intermediates(x, intermediates_only=True)
        expected = base.forward_intermediates(x, intermediates_only=True)
    assert calls == through_forward and len(calls) == 13
    assert all(torch.equal(a, b) for a, b in zip(features, expected, strict=True))


class Scaled(nn.Module):
    """Adds a branch that a tensor, if given, shifts; `mix` says how."""

    def __init__(self, mix):
        super().__init__()
        self.conv, self.mix = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()), mix

    def forward(self, x, w=None):
        y = self.conv(x)
        return x + self.mix(y, w)


class Gives(nn.Module):
    """Calls a `Scaled` with a tensor, or with a list of one."""

    def __init__(self, mix):
        super().__init__()
        self.stem, self.owner, self.w = nn.Conv2d(3, 8, 1), Scaled(mix), nn.Parameter(torch.rand(8))

    def forward(self, x):
        return self.owner(self.stem(x), [self.w] if self.owner.mix is asks_for_a_list else self.w)


def asks(y, w):
    return y if w is None else F.layer_norm(y, y.shape[-1:], w)


def asks_for_a_list(y, w):
    return y if not w else F.layer_norm(y, y.shape[-1:], w[0])


def passes(y, w):
    return F.layer_norm(y, y.shape[-1:], w)


@torch.no_grad()
def test_a_call_without_a_tensor_that_the_forward_asks_for_is_an_error_and_else_works():
    """F.layer_norm takes None for a weight, so that the trace of a call with one would run without one."""
    x, image = torch.randn(2, 8, 8, 8), torch.randn(2, 3, 8, 8)
    for mix in (asks, asks_for_a_list, passes):
        model = Gives(mix).eval()
        expected, owned = model(image), model.owner(x)
        fast = se_inject.optimize_for_inference(model, input_size=(3, 8, 8))
        se_inject.inject(model, input_size=(3, 8, 8))
        assert torch.equal(model(image), expected) and torch.allclose(fast(image), expected, atol=1e-5)
        with pytest.raises(SEInjectError, match=r"Scaled\.forward was optimized for one value of w"):
            fast.owner(x)
        if mix is passes:
            assert torch.equal(model.owner(x), owned)
            continue
        with pytest.raises(SEInjectError, match=r"Scaled\.forward was rewritten for one value of w"):
            model.owner(x)


@pytest.mark.filterwarnings("ignore:.*TorchScript type system")
@torch.no_grad()
def test_torchscript_knows_that_an_optional_tensor_is_there():
    """DLA: `shortcut` is replaced by the input where it is None, and added in place."""
    model = se_inject.inject(timm.create_model("dla46x_c"), init="timm").eval()
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(torch.jit.script(model)(x), model(x))


class Tied(nn.Module):
    """Calls one layer twice, or two layers of one kind."""

    def __init__(self, tied):
        super().__init__()
        self.a, self.c = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.b = self.a if tied else nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return x + self.c(self.b(self.a(x).relu()).relu())


@torch.no_grad()
@pytest.mark.parametrize("tied", [(True, False), (False, True)])
def test_owners_of_which_one_has_a_layer_twice_share_no_code(tied):
    model, x = nn.Sequential(nn.Conv2d(3, 8, 1), *map(Tied, tied)).eval(), torch.randn(2, 3, 8, 8)
    expected = model(x)
    assert torch.equal(se_inject.inject(model, input_size=(3, 8, 8))(x), expected) and len(block_paths(model)) == 2


class Called(nn.Module):
    """Calls a residual unit, which branches on an argument, twice: `again` makes the arguments of the second call."""

    def __init__(self, again):
        super().__init__()
        self.stem, self.unit, self.again = nn.Conv2d(3, 8, 1), Branching(), again

    def forward(self, x):
        x = self.unit(self.stem(x))
        return self.unit(*self.again(x))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x, flag=False, scale=None, more=()):
        y = self.b(self.a(x).relu())
        for t in more:
            y = y + t
        return x + (y * 2 if flag else y) * (1 if scale is None else scale)


@torch.no_grad()
@pytest.mark.parametrize("again, name", [
    (lambda x: (x,), None), (lambda x: (x, True), "flag"), (lambda x: (x, False, x), "scale"),
    (lambda x: (x, False, None, [x]), "more")])
def test_an_owner_is_rewritten_for_all_its_calls(again, name):
    model, x = Called(again).eval(), torch.randn(2, 3, 8, 8)
    expected = model(x)
    if name is None:
        assert torch.equal(se_inject.inject(model, input_size=(3, 8, 8))(x), expected)
    else:
        with pytest.raises(se_inject.NoSitesError, match=f"Branching.forward branches on {name}, and its calls differ"):
            se_inject.inject(model, input_size=(3, 8, 8))
    assert torch.equal(model(x), expected)
