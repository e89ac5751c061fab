"""A file is enough to rebuild a model."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import se_inject
from se_inject.errors import WeightsError
from se_inject.weights import files

from ..support.checks import channels_of, randomise
from ..support.outputs import out
from ..support.processes import fresh
from ..support.versions import needs_model_args


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


@needs_model_args
@pytest.mark.xdist_group("processes")
def test_a_new_process_rebuilds(tmp_path):
    torch.manual_seed(1)
    for i, model in enumerate(rebuilt()):
        model.eval()
        for p in model.parameters():
            p.data.add_(torch.randn_like(p) * 0.02)
        x = torch.randn(2, channels_of(model), 64, 64)
        with torch.no_grad():
            y = model(x)
        se_inject.save(model, tmp_path / f"{i}.safetensors")
        timm.models._hub.save_for_hf(model, tmp_path / f"{i}", safe_serialization=True)
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


@needs_model_args
def test_the_folder_of_either_door_names_the_twin(tmp_path):
    model = se_inject.inject(timm.create_model("test_resnet"), stages=(1, 2))
    args = dict(model._model_args)
    timm.models._hub.save_for_hf(model, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["architecture"] == "se_inject/test_resnet" and config["model_args"]["se_stages"] == [1, 2]
    assert model._model_args == args
    se_inject.eject(model)
    timm.models._hub.save_for_hf(model, tmp_path / "b")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["architecture"] == "test_resnet" and not any(k.startswith("se_") for k in config["model_args"])


@pytest.fixture
def warnings(monkeypatch):
    """The warnings of `save` in the log."""
    said: list[str] = []
    monkeypatch.setattr(files._logger, "log", lambda level, text, *args: said.append(text % args) if level >= 30 else None)
    return said


def _head(model):
    model.fc = nn.Sequential(nn.Linear(96, 8), nn.ReLU(), nn.Linear(8, 3))


def _stage(model):
    model.layer3 = nn.Identity()
    model.layer4 = nn.Sequential(nn.Conv2d(48, 96, 1), nn.ReLU())


def _narrow(model):
    model.fc = nn.Linear(96, 7)  # timm does not see it


def _more(model):
    model.register_buffer("mean", torch.zeros(3))


@pytest.mark.parametrize("change, name", [
    (_head, "fc.0.weight"), (_stage, "layer4.0.weight"), (_more, "mean"),
    pytest.param(_narrow, "fc.weight", marks=needs_model_args)])
def test_a_model_that_no_file_rebuilds_is_written_with_a_warning(tmp_path, warnings, change, name):
    def net():
        model = timm.create_model("test_resnet")
        change(model)
        return model

    path = tmp_path / "m.safetensors"
    model = randomise(se_inject.inject(net())).eval()
    se_inject.save(model, path)
    (said,) = warnings
    assert "cannot build this model by itself" in said and f"({name}" in said and "model=..." in said
    with pytest.raises(WeightsError, match=r"load\(path, model=...\)"):
        se_inject.load(path)
    assert torch.equal(out(se_inject.load(path, net()).eval()), out(model))
    warnings.clear()
    se_inject.save(model, path, only="se")  # the head is the base's
    assert bool(warnings) == (change in (_stage, _more))


def _stem(model):
    model.conv1[0].stride = (1, 1)


def _pool(model):
    model.maxpool = nn.AvgPool2d(3, 2, 1)


def _act(model):
    model.layer1[0].act1 = nn.GELU()


def _eps(model):
    model.bn1.eps = 0.1


@pytest.mark.parametrize("change, name", [(_stem, "conv1.0"), (_pool, "maxpool"), (_act, "layer1.0.act1"), (_eps, "bn1")])
def test_a_model_that_a_file_would_rebuild_with_other_layers_is_written_with_a_warning(tmp_path, warnings, change, name):
    model = se_inject.inject(timm.create_model("test_resnet"))
    change(model)
    se_inject.save(model, tmp_path / "m.safetensors")
    (said,) = warnings
    assert f"has another layer {name!r}" in said
    warnings.clear()
    model = se_inject.inject(timm.create_model("test_resnet", drop_rate=0.1, drop_path_rate=0.1))
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for m in model.modules():
        if isinstance(m, nn.ReLU):
            m.inplace = False
        if isinstance(m, nn.SyncBatchNorm):
            m.momentum = 0.01
    se_inject.save(model, tmp_path / "m.safetensors")
    assert not warnings


@needs_model_args
def test_a_model_that_a_file_rebuilds_has_no_warning(tmp_path, warnings):
    state = torch.get_rng_state()
    for i, model in enumerate(rebuilt()):
        torch.set_rng_state(state)
        for only in (None, "se"):
            se_inject.save(model, tmp_path / f"{i}.safetensors", only=only)
        assert torch.equal(torch.get_rng_state(), state)
    se_inject.save(se_inject.inject(timm.create_model("seresnet18"), existing="replace"), tmp_path / "a.safetensors")
    assert not warnings


@pytest.mark.xdist_group("processes")
def test_a_small_file_takes_no_memory_for_a_large_model(tmp_path):
    model = randomise(timm.create_model("se_inject/test_vit", se_ratio=0.25))
    good = tmp_path / "good.safetensors"
    se_inject.save(model, good)
    with safe_open(good, framework="pt") as f:
        header = f.metadata()
    recipe = json.loads(header["se_inject"])
    config = {k: v for k, v in recipe["configs"][0].items() if k != "ratio"}
    for i, change in enumerate((
            {"model_args": {"img_size": 16_000}}, {"model_args": {"embed_dim": 19_200}}, {"model_args": {"depth": 600}},
            {"model_args": {"num_classes": 10_000_000, "depth": 5}}, {"architecture": "vit_giant_patch14_224"},
            {"configs": [{**config, "rd_channels": 4_000_000}]}, {"configs": [{**config, "rd_divisor": 4_000_000}]})):
        text = json.dumps({**recipe, **change})
        save_file(load_file(good), tmp_path / f"{i}.safetensors", metadata={**header, "se_inject": text})
    code = """
import pathlib, resource, sys, timm, torch, se_inject
se_inject.load(sys.argv[1] + "/good.safetensors")
for i in range(7):
    path = f"{sys.argv[1]}/{i}.safetensors"
    for kwargs in ({}, {"model": timm.create_model("test_vit")}) if i > 4 else ({},):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            se_inject.load(path, **kwargs)
        except se_inject.SEInjectError as error:
            took = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
            print(i, took < 100, "no memory was taken" in str(error), error if "no memory was taken" not in str(error) else "")
"""
    done = fresh(code, tmp_path)
    assert [line.split()[:3] for line in done.stdout.splitlines()] == [
        [str(i), "True", "True"] for i in (0, 1, 2, 3, 4, 5, 5, 6, 6)], done.stdout + done.stderr
