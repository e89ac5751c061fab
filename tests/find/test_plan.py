"""A plan: which sites the options choose, and what it says."""

from __future__ import annotations

import timm

import se_inject


def test_filters():
    names = [s.path for s in se_inject.plan("resnet18", include="layer[12].*", exclude="*.0.se").sites]
    assert names == ["layer1.1.se", "layer2.1.se"]
    assert len(se_inject.plan("resnet18", min_channels=256).sites) == 4
    plan = se_inject.plan("resnet18", filter_fn=lambda s: s.size == (7, 7))
    assert [s.stage for s in plan.sites] == [4, 4]
    assert {s.reason for s in plan.skipped} == {"filter_fn said no"}


def test_plan_adds_up_and_goes_to_json():
    import json

    model = timm.create_model("mobilenetv2_100")
    plan = se_inject.plan(model)
    before = sum(p.numel() for p in model.parameters())
    se_inject.inject(model)
    assert sum(p.numel() for p in model.parameters()) == before + plan.added_params
    said = json.loads(json.dumps(plan.to_dict()))
    assert said["added_params"] == plan.added_params and len(said["sites"]) == len(plan.all_sites)
    assert str(plan).splitlines()[-1].startswith(f"mobilenetv2_100: {len(plan.sites)} sites, 0 skipped; {before:,} + ")
