"""An fx GraphModule is rewritten in its own graph."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torchvision
from torch import fx
from torchvision.models.feature_extraction import create_feature_extractor

import se_inject
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
