"""Attention that is there already: named, stacked on, or replaced."""

from __future__ import annotations

import pytest
import timm
import torch

import se_inject
from se_inject.blocks.squeeze_excite import SqueezeExcite

from ..support.toys import Net
from ..support.units import (
    Gated,
)


def test_existing_attention_is_named_and_stacks():
    model = Net(Gated())
    with pytest.raises(se_inject.NoSitesError, match=r'already have channel attention: use existing="stack"'):
        se_inject.inject(model, input_size=(3, 8, 8))
    se_inject.inject(model, input_size=(3, 8, 8), existing="stack")
    assert isinstance(model.unit.se, SqueezeExcite)


def test_existing_attention_is_replaced_and_comes_back():
    model = timm.create_model("seresnet18").eval()
    keys, x = list(model.state_dict()), torch.randn(1, 3, 64, 64)
    before = model(x)
    plan = se_inject.plan(model, existing="replace", ratio=0.5)
    assert len(plan.sites) == 8 and not plan.skipped
    assert plan.sites[0].replaces == tuple(k for k in keys if k.startswith("layer1.0.se."))
    assert "layer1.0.se  replaces layer1.0.se.fc1.weight, " in str(plan)
    se_inject.inject(model, existing="replace", ratio=0.5)
    assert isinstance(model.layer1[0].se, SqueezeExcite) and model.layer1[0].se.fc1.out_channels == 32
    assert list(model.state_dict()) == keys
    assert torch.equal(se_inject.eject(model)(x), before)
    with pytest.raises(se_inject.NoSitesError, match="no module that could be swapped"):
        se_inject.inject(Net(Gated()), input_size=(3, 8, 8), existing="replace")
