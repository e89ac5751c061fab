"""The generated forward is called wherever the author's is."""

from __future__ import annotations

import copy

import timm
import torch

import se_inject
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
