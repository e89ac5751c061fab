"""An fx GraphModule is rewritten in its own graph."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import timm
import torch
import torchvision
from torch import fx, nn
from torchvision.models.feature_extraction import create_feature_extractor

import se_inject
from se_inject import block_paths
from se_inject.blocks import catalogue
from se_inject.blocks.squeeze_excite import SqueezeExcite

from ..support.residual import Network, Unit


@pytest.mark.parametrize("make", [
    lambda: fx.symbolic_trace(Network(Unit(), Unit()).eval()),
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


class Scaled(nn.Module):
    """A block with a parameter and no layers."""

    def __init__(self, channels, start=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels, 1, 1), start))

    def forward(self, x):
        return x * self.weight


class Nested(nn.Module):
    """A block with layers in layers, and a parameter."""

    def __init__(self, channels):
        super().__init__()
        self.inner = nn.Sequential(nn.Sequential(nn.Conv2d(channels, channels, 1)), Scaled(channels, 0.0))

    def forward(self, x):
        return x * (1 + self.inner(x.mean((2, 3), keepdim=True)))


@pytest.fixture
def own_blocks(monkeypatch):
    monkeypatch.setattr(catalogue, "_rows", dict(catalogue._rows))
    se_inject.register_block("scaled", Scaled)
    se_inject.register_block("nested", Nested)


@pytest.mark.parametrize("block", ["se", "film", "eca", "scaled", "nested"])
@pytest.mark.parametrize("inside", [False, True])
def test_the_blocks_of_what_fx_has_traced_are_found(block, inside, own_blocks):
    model = se_inject.inject(timm.create_model("test_resnet"), block=block)
    net = nn.Sequential(OrderedDict(backbone=model)) if inside else model
    prefix = "backbone." if inside else ""
    features = create_feature_extractor(net, {f"{prefix}layer3": "a"})
    paths = [f"{prefix}layer{i}.0.se" for i in (1, 2, 3)]
    own = [p for path in paths for p in net.get_submodule(path).parameters()]
    for traced in (features, create_feature_extractor(features, [f"{prefix}layer3"])):
        assert block_paths(traced) == paths
        found = se_inject.se_parameters(traced)
        assert len(found) == len(own) > 0 and all(a is b for a, b in zip(found, own))
    optimizer = torch.optim.SGD(own[:1], lr=0.1)
    assert len(se_inject.se_parameters(features, optimizer)) == len(own) - 1
    copied = block_paths(copy.deepcopy(features))
    assert copied == ([] if block == "scaled" else paths)  # a copy of a parameter has no attributes
    holder = nn.ModuleDict({"body": features})
    assert block_paths(holder) == [f"body.{path}" for path in paths]
    se_inject.freeze_base(features, head=False)
    assert [p for p in features.parameters() if p.requires_grad] == own
