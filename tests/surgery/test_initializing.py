"""`init_weights` of timm's models: blocks that it draws come back to their start, blocks that it leaves alone stay."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

import se_inject
from se_inject import block_paths
from se_inject.blocks.identity import is_identity

from ..support.versions import needs_models_on_meta

X = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name, options", [("test_resnet", {}), ("test_vit", {}), ("test_vit", {"mode": "jax"})])
def test_blocks_come_back_to_their_start(name, options):
    model = timm.create_model(f"se_inject/{name}").eval()
    before = next(p.clone() for p in model.parameters() if p.dim() > 1)
    model.init_weights(**options)
    assert not torch.equal(next(p for p in model.parameters() if p.dim() > 1), before)
    assert all(is_identity(model.get_submodule(path)) for path in block_paths(model))
    base = se_inject.eject(copy.deepcopy(model))
    with torch.no_grad():
        assert torch.equal(model(X), base(X))
    assert "init_weights" not in vars(base)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(timm.create_model("test_resnet").layer1))
        self.head = nn.Linear(32, 2)

    def init_weights(self):
        self.head.reset_parameters()
        return self

    def forward(self, x):
        return self.head(self.layers(x).mean((2, 3)))


def test_blocks_that_it_leaves_alone_stay():
    model = se_inject.inject(Model(), input_size=(32, 8, 8))
    (path,) = block_paths(model)
    with torch.no_grad():
        model.get_submodule(path).fc2.weight.fill_(1.0)
    assert model.init_weights() is model
    assert model.get_submodule(path).fc2.weight.eq(1.0).all()


@needs_models_on_meta
def test_on_the_meta_device_it_does_nothing_to_them():
    with torch.device("meta"):
        model = timm.create_model("se_inject/test_vit")
    model.init_weights()
    model.to_empty(device="cpu").init_weights()
    assert all(is_identity(model.get_submodule(path)) for path in block_paths(model))
