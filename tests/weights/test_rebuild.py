"""A file is enough to rebuild a model."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

import se_inject

from ..support.processes import fresh


def rebuilt():
    """Models that a file must rebuild, each with an option that is not the default."""
    vit = timm.create_model(
        "se_inject/vit_tiny_patch16_224", depth=4, img_size=32, num_classes=7, se_rd_channels=5, se_stages=(0, 1))
    vit.reset_classifier(9)
    vit.set_input_size(img_size=64)
    yield vit
    yield timm.create_model(
        "se_inject/swinv2_cr_tiny_ns_224", img_size=64, window_size=2, depths=(1, 1, 2, 1), embed_dim=24,
        se_placement="post", se_min_channels=90)
    yield se_inject.inject(timm.create_model("test_resnet", in_chans=1, act_layer="silu"), filter_fn=lambda s: s.stage == 3)
    yield se_inject.inject(se_inject.inject(timm.create_model("test_resnet"), stages=1, ratio=0.5), stages=3, block="eca")
    options = {"se_gate_layer": "hard_sigmoid", "se_init": "timm", "se_include": "blocks.2*"}
    yield timm.create_model("se_inject/mobilenetv2_035", **options)
    yield timm.create_model("se_inject/vit_tiny_patch16_dinov3_qkvb", depth=2, num_classes=7)  # timm's default: no head
    headless = timm.create_model("se_inject/mobilenetv2_050", num_classes=10, se_block="ese", se_bias=True)
    headless.reset_classifier(0, "max")
    yield headless


@pytest.mark.xdist_group("processes")
def test_a_new_process_rebuilds(tmp_path):
    torch.manual_seed(1)
    for i, model in enumerate(rebuilt()):
        model.eval()
        for p in model.parameters():
            p.data.add_(torch.randn_like(p) * 0.02)
        x = torch.randn(2, timm.models.get_model_args(model)["in_chans"], 64, 64)
        with torch.no_grad():
            y = model(x)
        se_inject.save(model, tmp_path / f"{i}.safetensors")
        timm.models.save_for_hf(model, tmp_path / f"{i}", safe_serialization=True)
        save_file({"x": x, "y": y}, tmp_path / f"{i}.io")
    code = """
import pathlib, sys, timm, torch, se_inject
from safetensors.torch import load_file
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.io")):
    io = load_file(path)
    models = (se_inject.load(path.with_suffix(".safetensors")), se_inject.load(path.with_suffix("")),
              timm.create_model(f"local-dir:{path.with_suffix('')}", pretrained=True).eval())
    with torch.no_grad():
        print(*[torch.equal(model(io["x"]), io["y"]) for model in models])
"""
    done = fresh(code, tmp_path)
    assert done.stdout.split() == ["True"] * 21, done.stderr


def test_the_folder_of_either_door_names_the_twin(tmp_path):
    model = se_inject.inject(timm.create_model("test_resnet"), stages=(1, 2))
    args = dict(model._model_args)
    timm.models.save_for_hf(model, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["architecture"] == "se_inject/test_resnet" and config["model_args"]["se_stages"] == [1, 2]
    assert model._model_args == args
    se_inject.eject(model)
    timm.models.save_for_hf(model, tmp_path / "b")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["architecture"] == "test_resnet" and not any(k.startswith("se_") for k in config["model_args"])
