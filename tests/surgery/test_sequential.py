"""Blocks between the layers of a Sequential."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

import se_inject
from se_inject.surgery.state import block_paths

from ..support.checks import randomise
from ..support.versions import needs_intermediates


@needs_intermediates
def test_the_positions_of_a_sequential_are_its_authors():
    """Code that iterates or indexes a Sequential counts the layers that it put there, and runs the blocks with them."""
    model = randomise(timm.create_model("vgg11", mlp_ratio=0.02)).eval()
    x = torch.randn(1, 3, 64, 64)
    names = [type(m).__name__ for m in model.features]
    with torch.no_grad():
        last, features = model.forward_intermediates(x, indices=[1, 3])
        se_inject.inject(model)
        again, ours = model.forward_intermediates(x, indices=[1, 3])
        assert torch.equal(last, again) and all(map(torch.equal, features, ours))
        for block in block_paths(model):
            torch.nn.init.normal_(model.get_submodule(block).fc2.bias)
        gated = model.forward_intermediates(x, indices=[1, 3], intermediates_only=True)
        assert not any(map(torch.equal, gated, ours))
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        assert all(torch.equal(m(x), model(x)) for m in copies)
        twin, _ = copies
        twin.prune_intermediate_layers([1])
        assert len(twin.features) < len(names) and block_paths(twin) == block_paths(model)[:2]
        assert torch.equal(twin.forward_intermediates(x, indices=[1], intermediates_only=True)[0], gated[0])
        y = x
        for i in range(len(model.features)):
            y = model.features[i](y)
        assert torch.equal(y, model.features(x)) and not torch.equal(y, last)
    assert len(model.features) == len(names) and model.features[-1] is list(model.features)[-1]
    assert model.features[0].out_channels == 64 and model.features[1].inplace
    gated = model.features[1]  # a layer with a block behind it
    with torch.no_grad():
        y = model.features[0](x)
        assert all(torch.equal(twin(y.clone()), gated(y.clone())) for twin in (
            copy.copy(gated), copy.deepcopy(gated), pickle.loads(pickle.dumps(gated))))
    gated.inplace = False
    assert not model.features.get_submodule("1").inplace
    with pytest.raises(se_inject.SEInjectError, match="eject"):
        del model.features[0]
    se_inject.eject(model)
    assert [type(m).__name__ for m in model.features] == names and type(model.features) is torch.nn.Sequential


def test_a_rewritten_root_is_compiled_whole():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU())

        def forward(self, x):
            for layer in self.features:
                x = layer(x)
            return x

    model, x = randomise(se_inject.inject(Net().eval(), input_size=(3, 32, 32))), torch.randn(2, 3, 32, 32)
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))
    assert torch.equal(torch.compile(model.features, backend="eager", fullgraph=True)(x), model.features(x))


class LayerDrop(nn.Sequential):
    """Leaves out layers at random in train mode."""

    def __iter__(self):
        return iter([m for m in super().__iter__() if not self.training or torch.rand(()) > 0.5])


class Reversed(nn.Sequential):
    def __iter__(self):
        return reversed([*super().__iter__()])


@torch.no_grad()
def test_a_sequential_that_its_author_iterates_otherwise_is_no_plain_one():
    layers = [nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    plan = se_inject.plan(nn.Sequential(nn.Conv2d(3, 8, 3), LayerDrop(*layers)), input_size=(3, 16, 16))
    assert not plan.sites and all("between train and eval mode" in s.reason for s in plan.skipped)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), Reversed(*layers[::-1])).eval(), torch.randn(2, 3, 16, 16)
    expected = model(x)
    assert torch.equal(se_inject.inject(model, input_size=(3, 16, 16))(x), expected) and len(block_paths(model)) == 2
