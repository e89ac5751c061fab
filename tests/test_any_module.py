"""Models that are not timm's: written by hand, torchvision's, and fx GraphModules; forwards that branch on sizes."""

import copy
import io

import pytest
import timm
import torch
import torchvision
from timm.layers import DropPath
from torch import fx, nn
from torchvision.models.feature_extraction import create_feature_extractor

import se_inject
from se_inject.gate import SqueezeExcite
from se_inject.loading import block_paths

from .util import check_identity, randomise


def conv(i: int, o: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())


class Unit(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv(16, 16), conv(16, 16)

    def forward(self, x):
        return torch.relu(self.b(self.a(x)) + x)


class Net(nn.Module):
    """No config, no feature info: the stem says the channels, and CIFAR's or ImageNet's size is tried."""

    def __init__(self, *units: nn.Module):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.units = nn.Sequential(*units)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.units(self.stem(x)).mean((2, 3)))


def test_a_plain_residual_network():
    check_identity(Net(Unit(), Unit()), (3, 16, 16))
    assert block_paths(se_inject.inject(Net(Unit(), Unit()))) == ["units.0.se", "units.1.se"]


@pytest.mark.parametrize("make", [
    lambda: fx.symbolic_trace(Net(Unit(), Unit()).eval()),
    lambda: create_feature_extractor(torchvision.models.resnet18(), ["layer2", "layer4"]),
    lambda: timm.create_model("resnet18", features_only=True, feature_cls="fx"),
])
def test_a_graph_module_is_rewritten_in_its_own_graph(make):
    torch.manual_seed(0)
    model = make().eval()
    size = (3, 64, 64)
    x = torch.randn(2, *size)

    def outputs(m):
        with torch.no_grad():
            y = m(x)
        return [y] if isinstance(y, torch.Tensor) else list(y.values() if isinstance(y, dict) else y)

    def code():
        return [m.code for m in model.modules() if isinstance(m, fx.GraphModule)]

    before, keys, was = outputs(model), list(model.state_dict()), code()
    assert was
    plan = se_inject.plan(model, input_size=size)
    assert len(plan.sites) in (2, 8) and all("+" in s.drawing for s in plan.sites)
    se_inject.inject(model, input_size=size)
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(model), strict=True))
    assert sum(isinstance(m, SqueezeExcite) for m in model.modules()) == len(plan.sites)
    twin = copy.deepcopy(model)
    for m in twin.modules():
        if isinstance(m, SqueezeExcite):
            m.gain = 0.0  # the gates are called
    assert not torch.equal(before[-1], outputs(twin)[-1])
    model.train()
    model.eval()
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(model), strict=True))
    se_inject.eject(model)
    assert list(model.state_dict()) == keys and code() == was
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(model), strict=True))


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
    model = Net(Branching())
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
    model = Net(Unit(), OnValues())
    with pytest.raises(se_inject.SEInjectError):
        se_inject.plan(model, input_size=(3, 16, 16))  # it cannot run without values
    assert type(model.units[1]) is OnValues


@pytest.mark.parametrize("name, sizes", [
    ("swin_tiny_patch4_window7_224", [({"img_size": 448, "window_size": 7}, 448), ({"img_size": 256, "window_size": 8}, 256)]),
    ("swinv2_cr_tiny_ns_224", [({"img_size": (288, 288)}, 288)]),
    ("vit_tiny_patch16_224", [({"img_size": 160}, 160)]),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore::UserWarning:timm")
def test_attributes_that_are_set_later_are_seen(name, sizes):
    """A trace holds what an attribute was; one that is set makes it be traced anew."""
    base = randomise(timm.create_model(name)).eval()
    model = se_inject.inject(copy.deepcopy(base))
    classes = [type(m) for m in base.modules()]
    for kwargs, side in sizes:
        x = torch.randn(1, 3, side, side)
        for m in (base, model):
            m.set_input_size(**kwargs)
        stale = copy.deepcopy(model)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        with torch.no_grad():
            expected = base(x)
            for m in (model, stale, torch.load(buffer, weights_only=False)):
                assert torch.equal(m(x), expected)
    se_inject.eject(model)
    assert [type(m) for m in model.modules()] == classes


class Flagged(Unit):
    def __init__(self):
        super().__init__()
        self.skip = True
        self.alone = None

    def forward(self, x):
        y = self.b(self.a(x))
        if self.alone is not None:
            return self.alone(x)
        return x + y if self.skip else y


def test_a_flag_that_is_set_later():
    model = se_inject.inject(Net(Flagged()).eval(), input_size=(3, 16, 16))
    base = Net(Flagged()).eval()
    base.load_state_dict({k: t for k, t in model.state_dict().items() if ".se." not in k})
    x = torch.randn(1, 3, 16, 16)
    for m in (model, base):
        m.units[0].skip = False
    with torch.no_grad():
        assert torch.equal(model(x), base(x))
    calls = []
    model.units[0].se.register_forward_hook(lambda *a: calls.append(1))
    model(x)
    assert calls == [1]
    model.units[0].alone = nn.Identity()  # the branch goes nowhere now, and the block with it
    base.units[0].alone = nn.Identity()
    with torch.no_grad():
        assert torch.equal(model(x), base(x))


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
