"""A plan: which sites the options choose, and what it says."""

from __future__ import annotations

import json

import numpy as np
import timm

import se_inject


def test_filters():
    names = [s.path for s in se_inject.plan("resnet18", include="layer[12].*", exclude="*.0.se").sites]
    assert names == ["layer1.1.se", "layer2.1.se"]
    assert len(se_inject.plan("resnet18", min_channels=256).sites) == 4
    plan = se_inject.plan("resnet18", filter_fn=lambda s: s.size == (7, 7))
    assert [s.stage for s in plan.sites] == [4, 4]
    assert {s.reason for s in plan.skipped} == {"filter_fn said no"}


def test_a_glob_that_matches_nothing_is_said(caplog):
    plan = se_inject.plan("resnet18", exclude=("layer4", "layer3.*"), include="*")
    assert [r.getMessage() for r in caplog.records] == [
        "exclude='layer4' matches no site of resnet18: a glob is of whole paths, such as 'layer4.*'"]
    assert {s.stage for s in plan.sites} == {1, 2, 4}


def test_numbers_of_numpy():
    config = se_inject.SEConfig(ratio=np.float32(0.125), rd_divisor=np.int64(4), stages=np.arange(2, 4))
    assert json.loads(json.dumps(config.to_dict())) == {"ratio": 0.125, "rd_divisor": 4, "stages": [2, 3]}
    assert se_inject.SEConfig(stages=np.int64(3)) == se_inject.SEConfig(stages=3)


def test_plan_adds_up_and_goes_to_json():
    model = timm.create_model("mobilenetv2_100")
    plan = se_inject.plan(model)
    before = sum(p.numel() for p in model.parameters())
    se_inject.inject(model)
    assert sum(p.numel() for p in model.parameters()) == before + plan.added_params
    said = json.loads(json.dumps(plan.to_dict()))
    assert said["added_params"] == plan.added_params and len(said["sites"]) == len(plan.all_sites)
    assert str(plan).splitlines()[-1].startswith(f"mobilenetv2_100: {len(plan.sites)} sites, 0 skipped; {before:,} + ")
