"""A gate goes into the weights of the layer that reads the gated map, where that is less work."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import se_inject
from se_inject.inference.scaled_weights import scaled

from ..support.checks import randomise


class Products(TorchDispatchMode):
    """Counts the products whose result has more than `limit` numbers."""

    def __init__(self, limit):
        super().__init__()
        self.limit, self.wide = limit, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.wide += func.overloadpacket in (torch.ops.aten.mul, torch.ops.aten.mul_) and out.numel() > self.limit
        return out


class WithBlock(nn.Module):
    """timm's block on a map of 16 channels that goes into a layer."""

    def __init__(self, layer=None):
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.se = timm.layers.SqueezeExcite(16, rd_channels=4)
        self.layer = nn.Conv2d(16, 8, 1) if layer is None else layer

    def forward(self, x):
        return self.layer(self.se(self.first(x).relu()))


class ReadTwice(WithBlock):
    def forward(self, x):
        x = self.se(self.first(x).relu())
        return self.layer(x) + x[:, :8]


class Nested(WithBlock):
    def __init__(self):
        super().__init__(layer=nn.Sequential(nn.Dropout(), nn.Sequential(nn.Conv2d(16, 8, 1), nn.ReLU())))


def fast_of(model, size):
    model = randomise(model).eval()
    return model, se_inject.optimize_for_inference(model, input_size=size)


@torch.no_grad()
@pytest.mark.parametrize("model, weights", [
    (WithBlock(), True),
    (WithBlock(nn.Conv2d(16, 8, 3, stride=2, padding=1)), True),
    (WithBlock(nn.Conv2d(16, 8, 1, bias=False)), True),
    (Nested(), True),
    (WithBlock(nn.Conv2d(16, 16, 3, groups=16)), False),  # with groups the channels of a weight are others
    (WithBlock(nn.ConvTranspose2d(16, 8, 1)), False),
    (ReadTwice(), False),
], ids=["1x1", "3x3", "no bias", "nested", "groups", "transposed", "read twice"])
def test_the_map_is_scaled_where_the_weights_cannot_be(model, weights):
    model, fast = fast_of(model, (3, 12, 12))
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 12, 12)
        with Products(16 * 8 * 9) as products:
            out = fast(x)
        assert torch.allclose(out, model(x), atol=1e-5, rtol=1e-5)
        assert (products.wide == 0) == (weights and batch == 1)


@torch.no_grad()
def test_small_maps_are_scaled():
    model, fast = fast_of(WithBlock(), (3, 12, 12))
    x = torch.randn(1, 3, 3, 3)  # 144 numbers, and 128 in the weight
    with Products(128) as products:
        out = fast(x)
    assert torch.allclose(out, model(x), atol=1e-5) and products.wide == 1


@torch.no_grad()
@pytest.mark.parametrize("name, placement, count", [
    ("mobilenetv2_050", "auto", 17), ("efficientnet_lite0", "auto", 16), ("regnetx_002", "auto", 13),
    ("resnet26", "inner", 8), ("convnext_atto", "inner", 12), ("efficientnet_b0", None, 16)])
def test_networks(name, placement, count):
    model = timm.create_model(name, num_classes=10)
    if placement is not None:
        se_inject.inject(model, placement=placement)
    model, fast = fast_of(model, None)
    assert sum("inference_scaled_weights_scaled(" in source for m in fast.modules() for source in sources(m)) == count


def sources(module):
    return [source for source, _ in getattr(type(module), "_se_code", ((), False))[0]]


@torch.no_grad()
def test_hooks_see_the_layer():
    model = randomise(WithBlock()).eval()
    seen = []
    model.layer.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    fast = se_inject.optimize_for_inference(model, input_size=(3, 12, 12))
    x = torch.randn(1, 3, 12, 12)
    out = fast(x)
    assert len(seen) == 1 and torch.allclose(out, model(x), atol=1e-5)
    assert torch.allclose(seen[0], seen[1], atol=1e-5)  # the gated map


@torch.no_grad()
def test_copies_hold_their_own_weights():
    model, fast = fast_of(WithBlock(), (3, 12, 12))
    other = copy.deepcopy(fast)
    other.layer.weight.zero_()
    x = torch.randn(1, 3, 12, 12)
    assert torch.allclose(fast(x), model(x), atol=1e-5)
    assert torch.equal(other(x), other.layer.bias.view(1, -1, 1, 1).expand(1, 8, 12, 12))


def test_a_gate_of_each_image_scales_the_map():
    x, weight = torch.randn(2, 4, 8, 8), torch.randn(3, 4, 1, 1)
    gate = torch.rand(2, 4, 1, 1)
    for in_place in (False, True):
        expected, given = x * gate, x.clone()
        y, w = scaled(given, gate, weight, in_place)
        assert torch.equal(y, expected) and w is weight
        assert (y.data_ptr() == given.data_ptr()) == in_place
    y, w = scaled(x[:1], gate[:1], weight, True)
    assert y.data_ptr() == x.data_ptr() and torch.equal(w, weight * gate[0].view(1, 4, 1, 1))


def test_script():
    script = torch.jit.script(scaled)
    x, weight, gate = torch.randn(1, 4, 8, 8), torch.randn(3, 4, 1, 1), torch.rand(1, 4, 1, 1)
    y, w = script(x, gate, weight, False)
    assert torch.equal(y, x * gate) and torch.equal(w, weight)
