"""Files: base, full and SE-only weights through every door, and files that are no good."""

import json
import logging

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import se_inject
from se_inject.checkpoint import read_checkpoint
from se_inject.errors import WeightsError

from .util import randomise

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
NAMES = ["resnet18", "tf_efficientnet_lite0", "convnext_atto"]


@pytest.fixture(scope="module", params=NAMES)
def files(request, tmp_path_factory):
    """One trained model's weights in every form, with the outputs that they must give."""
    folder, name = tmp_path_factory.mktemp("files"), request.param
    model = randomise(timm.create_model(f"se_inject/{name}")).eval()
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.02)
    y = model(X).detach()
    state = model.state_dict()
    se_inject.save(model, folder / "full.safetensors")
    se_inject.save(model, folder / "se.safetensors", only="se")
    torch.save({"state_dict": {f"module.{k}": t for k, t in state.items()}, "arch": f"se_inject/{name}", "epoch": 3},
               folder / "train.pth.tar")
    torch.save({"state_dict": {}, "state_dict_ema": {f"_orig_mod.{k}": t for k, t in state.items()}}, folder / "ema.pth")
    se_inject.eject(model)
    save_file(model.state_dict(), folder / "base.safetensors")
    yb = model(X).detach()
    assert not torch.equal(y, yb)
    return folder, name, y, yb


def out(model):
    with torch.no_grad():
        return model.eval()(X)


def test_load(files):
    folder, name, y, yb = files
    assert torch.equal(out(se_inject.load(folder / "full.safetensors")), y)
    assert torch.equal(out(se_inject.load(folder / "se.safetensors", base=folder / "base.safetensors")), y)
    assert torch.equal(out(se_inject.load(folder / "train.pth.tar")), y)
    assert torch.equal(out(se_inject.load(folder / "ema.pth", name)), y)
    assert torch.equal(out(se_inject.load(folder / "base.safetensors", name)), yb)
    given = timm.create_model(name)
    given.load_state_dict(load_file(folder / "base.safetensors"))
    assert se_inject.load(folder / "se.safetensors", given) is given
    assert given.training and torch.equal(out(given), y)


@pytest.mark.parametrize("file", ["full.safetensors", "base.safetensors", "train.pth.tar", "ema.pth"])
def test_checkpoint_path(files, file):
    folder, name, y, yb = files
    model = timm.create_model(f"se_inject/{name}", checkpoint_path=str(folder / file))
    assert torch.equal(out(model), yb if file.startswith("base") else y)


def test_overlay_and_pretrained(files):
    folder, name, y, yb = files
    for file, expected in (("full", y), ("base", yb)):
        overlay = {"file": str(folder / f"{file}.safetensors")}
        model = timm.create_model(f"se_inject/{name}", pretrained=True, pretrained_cfg_overlay=overlay)
        assert torch.equal(out(model), expected)
    model = timm.create_model(
        f"se_inject/{name}", pretrained=True, pretrained_cfg_overlay={"file": str(folder / "se.safetensors")})
    model.load_state_dict(load_file(folder / "base.safetensors"))
    assert torch.equal(out(model), y)
    model = timm.create_model(
        f"se_inject/{name}", pretrained=True, pretrained_cfg_overlay={"file": str(folder / "base.safetensors")},
        checkpoint_path=str(folder / "se.safetensors"))
    assert torch.equal(out(model), y)


def test_pretrained_weights_adapt_to_another_head(files):
    folder, name, _, _ = files
    overlay = {"file": str(folder / "base.safetensors")}
    model = timm.create_model(f"se_inject/{name}", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=4, in_chans=1)
    torch.manual_seed(0)
    plain = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=4, in_chans=1)
    x = torch.randn(1, 1, 64, 64)
    assert torch.equal(model.eval().forward_features(x), plain.eval().forward_features(x))
    assert model(x).shape == (1, 4)


def test_load_state_dict_says_what_it_did(files, caplog):
    folder, name, y, yb = files
    model = timm.create_model(f"se_inject/{name}")
    base, se = load_file(folder / "base.safetensors"), load_file(folder / "se.safetensors")
    with caplog.at_level(logging.INFO, "se_inject"):
        model.load_state_dict(base)
        assert torch.equal(out(model), yb)
        model.load_state_dict(se)
        assert torch.equal(out(model), y)
        model.load_state_dict(base)  # the blocks keep what they learned
        assert torch.equal(out(model), y)
    assert caplog.messages == [
        f"{len(base)} base tensors loaded, {len(se)} SE tensors at identity",
        f"{len(base)} base tensors kept, {len(se)} SE tensors loaded",
        f"{len(base)} base tensors loaded, {len(se)} SE tensors kept"]
    timm.models.load_checkpoint(model, str(folder / "full.safetensors"))
    assert torch.equal(out(model), y)
    wrapped = torch.nn.Sequential(model)
    wrapped.load_state_dict({f"0.{k}": t for k, t in base.items()})
    broken = dict(base)
    broken.pop(next(k for k, t in base.items() if t.dim() == 4))
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(broken)


def test_a_part_of_a_block_is_an_error(files):
    folder, name, _, _ = files
    model = timm.create_model(f"se_inject/{name}")
    state = load_file(folder / "full.safetensors")
    state.pop(next(iter(load_file(folder / "se.safetensors"))))
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(state)


def test_options_survive(tmp_path):
    model = timm.create_model("se_inject/vit_tiny_patch16_224", se_rd_channels=5, se_stages=(2, 3), num_classes=7, img_size=64)
    model.reset_classifier(9)
    se_inject.save(model, tmp_path / "a.safetensors")
    again = se_inject.load(tmp_path / "a.safetensors")
    assert torch.equal(out(again), out(model)) and out(again).shape == (2, 9)
    chosen = se_inject.inject(timm.create_model("resnet18"), filter_fn=lambda s: s.stage == 3)
    se_inject.save(chosen, tmp_path / "b.safetensors")
    assert torch.equal(out(se_inject.load(tmp_path / "b.safetensors")), out(chosen))
    twice = se_inject.inject(se_inject.inject(timm.create_model("resnet18"), stages=1, ratio=0.5), stages=3)
    se_inject.save(twice, tmp_path / "c.safetensors")
    assert torch.equal(out(se_inject.load(tmp_path / "c.safetensors")), out(twice))


def test_timms_folder_rebuilds(tmp_path):
    model = randomise(timm.create_model("se_inject/resnet18", se_ratio=0.5, num_classes=3)).eval()
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    assert torch.equal(out(timm.create_model(f"local-dir:{tmp_path}", pretrained=True)), out(model))
    assert torch.equal(out(se_inject.load(tmp_path)), out(model))


def test_save_writes_nothing_into_the_callers_metadata(tmp_path):
    metadata = {"note": "mine"}
    se_inject.save(se_inject.inject(timm.create_model("resnet18")), tmp_path / "a.safetensors", metadata=metadata)
    assert metadata == {"note": "mine"}
    assert read_checkpoint(tmp_path / "a.safetensors").metadata["note"] == "mine"


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    import safetensors.torch

    path = tmp_path / "a.safetensors"
    model = se_inject.inject(timm.create_model("resnet18"))
    se_inject.save(model, path)
    before = path.read_bytes()

    def half(tensors, file, metadata=None):
        with open(file, "wb") as f:
            f.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with pytest.raises(OSError, match="disk full"):
        se_inject.save(model, path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    with pytest.raises(WeightsError, match="cannot write"):
        se_inject.save(model, tmp_path / "no" / "a.safetensors")


def bad(tmp_path, kind):
    model = se_inject.inject(timm.create_model("resnet18"))
    good, path = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    se_inject.save(model, good)
    state, header = load_file(good), read_checkpoint(good).metadata
    recipe = json.loads(header["se_inject"])
    if kind == "truncated":
        path.write_bytes(good.read_bytes()[:5000])
        return path
    if kind == "pickle":
        path = tmp_path / "bad.pth"
        torch.save(model, path)
        return path
    if kind == "shape":
        state["layer1.0.se.fc1.weight"] = torch.zeros(3, 64, 1, 1)
    if kind == "missing":
        state.pop("layer1.0.conv1.weight")
    if kind == "unknown":
        state["layer9.weight"] = torch.zeros(1)
    if kind == "nan":
        state["layer1.0.conv1.weight"] = state["layer1.0.conv1.weight"] * float("nan")
    if kind == "version":
        recipe["version"] = 99
    if kind == "architecture":
        recipe["architecture"] = "os.system"
    if kind == "option":
        recipe["configs"] = [{"block": "__import__('os')"}]
    if kind == "json":
        header["se_inject"] = "{"
    else:
        header["se_inject"] = json.dumps(recipe)
    save_file(state, path, metadata=header)
    return path


@pytest.mark.parametrize("kind, message", [
    ("truncated", "no readable safetensors"), ("pickle", "no pickled code is run"), ("shape", "another shape"),
    ("missing", "1 missing"), ("unknown", "1 unknown"), ("nan", "NaN"), ("version", "version 99"),
    ("architecture", "timm has no model 'os.system'"), ("option", "block="), ("json", "no JSON")])  # fmt: skip
def test_bad_files_give_one_error_and_change_nothing(tmp_path, kind, message):
    path = bad(tmp_path, kind)
    with pytest.raises(se_inject.SEInjectError, match=message):
        se_inject.load(path, **({"model": "resnet18"} if kind == "pickle" else {}))
    given = timm.create_model("resnet18")
    before = {k: t.clone() for k, t in given.state_dict().items()}
    if kind not in ("architecture",):
        with pytest.raises(se_inject.SEInjectError, match=message):
            se_inject.load(path, given)
        after = given.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_an_se_only_file_needs_a_base(tmp_path):
    se_inject.save(se_inject.inject(timm.create_model("resnet18")), tmp_path / "se.safetensors", only="se")
    with pytest.raises(WeightsError, match="base=FILE"):
        se_inject.load(tmp_path / "se.safetensors")
    with pytest.raises(WeightsError, match="no file"):
        se_inject.load(tmp_path / "none.safetensors")
    with pytest.raises(se_inject.SEInjectError, match="its own recipe"):
        se_inject.load(tmp_path / "se.safetensors", ratio=0.5)
    with pytest.raises(WeightsError, match="no blocks"):
        se_inject.save(timm.create_model("resnet18"), tmp_path / "x.safetensors")
