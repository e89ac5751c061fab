"""``features_only`` on injected models: every family that has it, and every wrapper of timm's."""

from __future__ import annotations

import pytest
import timm
import torch

from se_inject import block_paths
from se_inject.tools import zoo

from ..support.checks import randomise
from .test_identity import FAMILIES, FEWER, REFUSED


def features(model, x):
    model.eval()
    with torch.no_grad():
        y = model(x)
    return list(y.values()) if isinstance(y, dict) else list(y)


def compare(name, **kwargs):
    """The features of a twin and of its base, which has the same weights; None where the base has no such features."""
    try:
        base = timm.create_model(name, features_only=True, **kwargs)
    except (RuntimeError, AttributeError, AssertionError, ValueError, KeyError, TypeError, NotImplementedError) as error:
        with pytest.raises(type(error)):
            timm.create_model(f"se_inject/{name}", features_only=True, **kwargs)
        return None
    stack = {"se_existing": "stack"} if name in REFUSED else {}
    ours = timm.create_model(f"se_inject/{name}", features_only=True, **kwargs, **stack)
    assert block_paths(ours)
    randomise(base)
    ours.load_state_dict(base.state_dict())  # a base's weights go into a twin, whose blocks keep theirs
    size = zoo.smallest_input(base)
    x = torch.randn(1, *size, generator=torch.Generator().manual_seed(1))
    mine, theirs = features(ours, x), features(base, x)
    assert len(mine) == len(theirs) > 0
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    return ours, base, x, theirs


@pytest.mark.contract
@pytest.mark.parametrize("name", FAMILIES)
def test_features_of_every_family(name):
    made = compare(name, **FEWER.get(name, {}))
    assert made is not None
    ours, base = made[:2]
    assert ours.feature_info.channels() == base.feature_info.channels()


@pytest.mark.parametrize("wrapper", ["list", "dict", "hook", "getter", "fx"])
@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "mobilenetv2_035", "vgg11", "test_vit"])
def test_every_wrapper(name, wrapper):
    if (name, wrapper) == ("vgg11", "hook"):
        pytest.skip("timm's own wrapper gives no features here")
    made = compare(name, feature_cls=wrapper, out_indices=(0, 2), **({"mlp_ratio": 0.02} if name == "vgg11" else {}))
    if made is not None:
        assert len(made[3]) == 2
