"""Stages are numbered as timm's `out_indices`."""

from __future__ import annotations

import pytest

import se_inject
from se_inject.timm_names import skeleton

from ..support.toys import needs


@pytest.mark.parametrize("name, stages", [
    ("twins_svt_small", {0, 1, 2, 3}),  # its feature info names modules that are not there
    ("hrnet_w18_small", {1, 2, 3, 4}),  # likewise; by resolution
    ("gemma4_vit_167m", set(range(16))),  # named without the wrapper around them
    ("legacy_xception", {1, 2, 3, 4}),  # taps inside the blocks
    ("coat_tiny", {0, 1, 2, 3})])  # one module for three entries
def test_stages_are_out_indices(name, stages):
    needs(name)
    model = skeleton(name)
    if not getattr(model, "feature_info", None):
        pytest.skip(f"this timm has no feature info of {name}")
    assert {s.stage for s in se_inject.plan(model).sites} == stages
