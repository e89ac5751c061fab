"""Files: base, full and SE-only weights through every door, and bad files."""

import json
import logging
import subprocess
import sys

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

import se_inject
from se_inject import block_paths
from se_inject.errors import WeightsError
from se_inject.weights.reading import read_checkpoint

from ..support.checks import randomise

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
NAMES = ["resnet18", "tf_efficientnet_lite0", "convnext_atto"]


@pytest.fixture(scope="module", params=NAMES)
def files(request, tmp_path_factory):
    """The weights of one trained model in every form, with the outputs that they must give."""
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


def test_base_by_one_door_and_blocks_by_another(files):
    folder, name, y, _ = files
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
        caplog.clear()
        model.load_state_dict(base)
        assert torch.equal(out(model), yb)
        model.load_state_dict(se)
        assert torch.equal(out(model), y)
        model.load_state_dict(base)  # the blocks keep their trained weights
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


def rebuilt():
    """Models that a file must rebuild, each with an option that is not the default."""
    vit = timm.create_model("se_inject/vit_tiny_patch16_224", se_rd_channels=5, se_stages=(2, 3), num_classes=7, img_size=32)
    vit.reset_classifier(9)
    vit.set_input_size(img_size=64)
    yield vit
    yield timm.create_model(
        "se_inject/swinv2_cr_tiny_ns_224", img_size=64, window_size=2, se_placement="post", se_min_channels=300)
    yield se_inject.inject(timm.create_model("resnet18", in_chans=1, act_layer="silu"), filter_fn=lambda s: s.stage == 3)
    yield se_inject.inject(se_inject.inject(timm.create_model("resnet18"), stages=1, ratio=0.5), stages=3, block="eca")
    options = {"se_gate_layer": "hard_sigmoid", "se_init": "timm", "se_include": "blocks.2*"}
    yield timm.create_model("se_inject/tf_efficientnet_lite0", **options)
    yield timm.create_model("se_inject/vit_tiny_patch16_dinov3_qkvb", num_classes=7)  # timm's default for it has no head
    headless = timm.create_model("se_inject/mobilenetv2_050", num_classes=10, se_block="ese", se_bias=True)
    headless.reset_classifier(0, "max")
    yield headless


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
torch.set_num_threads(1)
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.io")):
    io = load_file(path)
    models = (se_inject.load(path.with_suffix(".safetensors")), se_inject.load(path.with_suffix("")),
              timm.create_model(f"local-dir:{path.with_suffix('')}", pretrained=True).eval())
    with torch.no_grad():
        print(*[torch.equal(model(io["x"]), io["y"]) for model in models])
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.split() == ["True"] * 21, done.stderr


def test_a_model_that_is_not_timms(tmp_path):
    def net():
        return torchvision.models.resnet18(num_classes=4).eval()

    model = randomise(se_inject.inject(net(), input_size=(3, 48, 48), ratio=0.5)).eval()
    se_inject.save(model, tmp_path / "a.safetensors")
    assert torch.equal(out(se_inject.load(tmp_path / "a.safetensors", net())), out(model))
    with pytest.raises(WeightsError, match="does not say its architecture"):
        se_inject.load(tmp_path / "a.safetensors")


def test_the_folder_of_either_door_names_the_twin(tmp_path):
    model = se_inject.inject(timm.create_model("resnet18"), stages=(1, 2))
    args = dict(model._model_args)
    timm.models.save_for_hf(model, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["architecture"] == "se_inject/resnet18" and config["model_args"]["se_stages"] == [1, 2]
    assert model._model_args == args
    se_inject.eject(model)
    timm.models.save_for_hf(model, tmp_path / "b")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["architecture"] == "resnet18" and not any(k.startswith("se_") for k in config["model_args"])


def test_several_injections_by_timms_door():
    model = timm.create_model("se_inject/resnet18", se_injections=[{"stages": 1, "ratio": 0.5}, {"stages": [4]}])
    assert model.layer1[0].se.fc1.out_channels == 32 and model.layer4[0].se.fc1.out_channels == 32
    with pytest.raises(se_inject.SEInjectError, match="no other se_ option"):
        timm.create_model("se_inject/resnet18", se_injections=[{}], se_ratio=0.5)


def test_base_blocks_and_head_from_three_files(tmp_path):
    first = randomise(timm.create_model("se_inject/resnet18", num_classes=5)).eval()
    second = randomise(timm.create_model("se_inject/resnet18"), seed=7).eval()
    for name, part in {"se": "se", "head": "head", "both": ("head", "se"), "full": None}.items():
        se_inject.save(first, tmp_path / f"{name}.safetensors", only=part)
    save_file({k: t for k, t in second.state_dict().items() if ".se." not in k}, tmp_path / "base.safetensors")
    sizes = {p.stem: p.stat().st_size for p in tmp_path.iterdir()}
    assert sizes["se"] < 500_000 and sizes["head"] < 20_000
    third = timm.create_model("se_inject/resnet18", num_classes=5)
    state = {**second.state_dict(), **{k: t for k, t in first.state_dict().items() if ".se." in k or k.startswith("fc.")}}
    third.load_state_dict(state)
    y, base = out(third), tmp_path / "base.safetensors"
    for head in ("head", "full"):
        made = se_inject.load(tmp_path / "se.safetensors", base=base, head=tmp_path / f"{head}.safetensors")
        assert torch.equal(out(made), y)
    assert torch.equal(out(se_inject.load(tmp_path / "both.safetensors", base=base)), y)
    assert out(se_inject.load(tmp_path / "se.safetensors", base=base)).shape == (2, 1000)  # the head is the base's
    with pytest.raises(WeightsError, match="blocks and the head alone"):
        se_inject.load(tmp_path / "both.safetensors")
    with pytest.raises(WeightsError, match="no tensors of a classifier"):
        se_inject.load(tmp_path / "full.safetensors", head=tmp_path / "se.safetensors")
    with pytest.raises(se_inject.SEInjectError, match="only='heads'"):
        se_inject.save(first, tmp_path / "x.safetensors", only="heads")
    first.reset_classifier(0)
    with pytest.raises(WeightsError, match="no classifier"):
        se_inject.save(first, tmp_path / "x.safetensors", only="head")


def test_shards(tmp_path):
    model = randomise(timm.create_model("se_inject/resnet18")).eval()
    path, y = tmp_path / "m.safetensors", out(model)
    se_inject.save(model, path)
    se_inject.save(model, path, max_shard_size="20MB")
    shards = sorted(tmp_path.glob("m-*.safetensors"))
    assert len(shards) >= 3 and not path.exists() and all(p.stat().st_size < 21_000_000 for p in shards)
    index = json.loads((tmp_path / "m.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {p.name for p in shards} and index["metadata"]["total_size"] > 40_000_000
    assert torch.equal(out(se_inject.load(path)), y)
    assert torch.equal(out(se_inject.load(tmp_path / "m.safetensors.index.json")), y)
    se_inject.save(model, path, max_shard_size="30MB")  # the shards of the first save go
    assert not any(p.exists() for p in shards) and torch.equal(out(se_inject.load(path)), y)
    next(tmp_path.glob("m-*.safetensors")).rename(tmp_path / "away")
    with pytest.raises(WeightsError, match="is not there"):
        se_inject.load(path)
    se_inject.save(model, path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["away", "m.safetensors"]
    with pytest.raises(se_inject.SEInjectError, match="max_shard_size='much'"):
        se_inject.save(model, path, max_shard_size="much")


def test_native_weights_need_the_plain_gate(tmp_path):
    native = randomise(timm.create_model("seresnet18")).eval()
    path, y = tmp_path / "seresnet18.safetensors", out(native)
    save_file(native.state_dict(), path)
    assert torch.equal(out(timm.create_model("se_inject/resnet18", se_init="timm", checkpoint_path=str(path))), y)
    overlay = {"file": str(path)}
    model = timm.create_model("se_inject/resnet18", se_init="timm", pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(out(model), y)
    assert torch.equal(out(se_inject.load(path, "resnet18", init="timm")), y)
    se_inject.save(model, tmp_path / "ours.safetensors")
    with pytest.raises(WeightsError, match="blocks were made with"):  # the same tensors, twice the gate
        se_inject.load(tmp_path / "ours.safetensors", timm.create_model("se_inject/resnet18"))


def test_a_killed_save_loses_nothing(tmp_path):
    """A process that saves two models in turn is killed at random moments; the file always holds one of them."""
    code = """
import os, pathlib, random, signal, sys, time, timm, torch, se_inject
from se_inject.weights.reading import read_checkpoint
torch.set_num_threads(1)
path, shard = pathlib.Path(sys.argv[1]), sys.argv[2]
model = timm.create_model("se_inject/resnet18")
states = [{k: torch.full_like(t, i) for k, t in model.state_dict().items()} for i in (1, 2)]
model.load_state_dict(states[0])
se_inject.save(model, path, max_shard_size=shard)
random.seed(0)
seen, killed = set(), 0
for _ in range(12):
    child = os.fork()
    if child == 0:
        for i in range(1000):
            model.load_state_dict(states[1 - i % 2])
            se_inject.save(model, path, max_shard_size=("5GB", shard)[i // 2 % 2])
        os._exit(0)
    time.sleep(random.uniform(0.05, 0.4))
    os.kill(child, signal.SIGKILL)
    killed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    found = read_checkpoint(path)
    values = {float(v) for t in found.tensors.values() for v in (t.min(), t.max())}
    assert len(values) == 1 and found.tensors.keys() == states[0].keys() and found.recipe.sites, values
    seen |= values
print(killed, len(seen))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m.safetensors"), "20MB"], capture_output=True, text=True)
    assert done.stdout.split() == ["12", "2"], done.stderr


def test_save_of_a_wrapped_model(tmp_path):
    model = timm.create_model("se_inject/resnet18")
    se_inject.save(nn.DataParallel(model), tmp_path / "a.safetensors")
    assert torch.equal(out(se_inject.load(tmp_path / "a.safetensors")), out(model))
    with pytest.raises(WeightsError, match=r"save\(model.get_submodule\('inner'\), path\)"):
        se_inject.save(nn.ModuleDict({"inner": model}), tmp_path / "b.safetensors")


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
    if kind == "path":
        recipe["model_args"]["checkpoint_path"] = "/etc/passwd"
    if kind == "argument":
        recipe["model_args"]["block"] = "os.system"
    if kind == "sites":
        recipe["configs"] = [{"stages": [1]}]
    if kind == "part":
        state.pop("layer1.0.se.fc1.weight")
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
    ("architecture", "timm has no model 'os.system'"), ("option", "block="), ("json", "no JSON"), ("part", "1 missing"),
    ("path", "checkpoint_path='/etc/passwd'"), ("argument", "cannot create 'resnet18'"),
    ("sites", "its options lead to 2 blocks")])  # fmt: skip
def test_bad_files_give_one_error_and_change_nothing(tmp_path, kind, message):
    path = bad(tmp_path, kind)
    with pytest.raises(se_inject.SEInjectError, match=message):
        se_inject.load(path, **({"model": "resnet18"} if kind == "pickle" else {}))
    given = timm.create_model("resnet18")
    before = {k: t.clone() for k, t in given.state_dict().items()}
    if kind not in ("architecture", "argument"):  # a given model does not need it
        with pytest.raises(se_inject.SEInjectError, match=message):
            se_inject.load(path, given)
        after = given.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_no_text_of_a_recipe_is_run_or_imported(tmp_path):
    """Each string of a recipe is replaced by one that Python's audit hook would report if it were compiled or imported."""
    model = timm.create_model("se_inject/resnet18", se_act_layer="silu", se_include="layer*")
    se_inject.save(model, tmp_path / "good.safetensors")
    code = """
import copy, json, sys, timm, torch, se_inject
from safetensors.torch import load_file, save_file
from se_inject.weights.reading import read_checkpoint
state = load_file(sys.argv[1])
recipe = json.loads(read_checkpoint(sys.argv[1]).metadata["se_inject"])
recipe["model_args"] |= {"act_layer": "relu", "evil": "evil"}

def leaves(value, path=()):
    if isinstance(value, (dict, list)):
        for key, item in (value.items() if isinstance(value, dict) else enumerate(value)):
            yield from leaves(item, (*path, key))
    elif isinstance(value, str):
        yield path

seen, outcomes = [], []

def watch(event, args):
    if event in ("compile", "import", "exec") and "evil" in str(args):
        seen.append((event, args))

sys.addaudithook(watch)
for text in ("__import__('evil')", "evil.evil", "evil"):
    for path in leaves(recipe):
        if path[0] == "sites" and path[1] > 1:
            continue
        bad = copy.deepcopy(recipe)
        if path[-1] != "evil":
            del bad["model_args"]["evil"]
        at = bad
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = text
        save_file(state, sys.argv[2], metadata={"se_inject": json.dumps(bad)})
        try:
            se_inject.load(sys.argv[2])
            outcomes.append((path, "loads"))
        except se_inject.SEInjectError:
            outcomes.append((path, "refused"))
print(json.dumps([len(seen), outcomes]))
"""
    arguments = [str(tmp_path / "good.safetensors"), str(tmp_path / "bad.safetensors")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen, outcomes = json.loads(done.stdout)
    assert seen == 0 and len(outcomes) >= 18
    assert all(outcome == "refused" for _, outcome in outcomes), outcomes


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


def test_an_argument_that_would_be_ignored_is_refused(tmp_path):
    first = randomise(timm.create_model("se_inject/test_resnet"))
    plain = randomise(timm.create_model("se_inject/test_resnet", se_init="timm"), seed=3)
    for name, model in {"a": first, "b": plain}.items():
        for part in ("se", "head", None):
            se_inject.save(model, tmp_path / f"{name}-{part or 'full'}.safetensors", only=part)
    full, se, head = (tmp_path / f"a-{part}.safetensors" for part in ("full", "se", "head"))
    with pytest.raises(WeightsError, match="none would be taken from there"):
        se_inject.load(full, base=tmp_path / "b-full.safetensors")
    with pytest.raises(WeightsError, match="blocks were made with"):  # the blocks come from the base file, with another gate
        se_inject.load(head, base=tmp_path / "b-full.safetensors")
    made = se_inject.load(tmp_path / "b-head.safetensors", base=tmp_path / "b-full.safetensors")
    assert torch.equal(out(made), out(plain))
    save_file(first.state_dict(), tmp_path / "bare.safetensors")
    for path, model, kwargs in (
            (se, timm.create_model("test_resnet"), {"pretrained": True}),
            (full, timm.create_model("test_resnet"), {"model_args": {"num_classes": 5}}),
            (tmp_path / "bare.safetensors", timm.create_model("se_inject/test_resnet"), {"ratio": 0.5})):
        before = {k: t.clone() for k, t in model.state_dict().items()}
        with pytest.raises(se_inject.SEInjectError, match="already made"):
            se_inject.load(path, model, **kwargs)
        after = model.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)


def test_half_a_head_is_an_error(tmp_path):
    for name in ("deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"):
        se_inject.save(timm.create_model(f"se_inject/{name}", img_size=32, num_classes=4), tmp_path / name)
    with pytest.raises(WeightsError, match=r"head_dist\.weight"):
        se_inject.load(tmp_path / "deit_tiny_distilled_patch16_224", head=tmp_path / "deit_tiny_patch16_224")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A small trained model, the tensors of its file, and the recipe in the file."""
    model = randomise(timm.create_model("se_inject/test_resnet")).eval()
    path = tmp_path_factory.mktemp("written") / "m.safetensors"
    se_inject.save(model, path)
    return model, load_file(path), json.loads(read_checkpoint(path).metadata["se_inject"])


@pytest.mark.parametrize("field, value", [
    ("content", "se+se"), ("content", "head+se"), ("content", ""), ("input_sizes", [[float("inf"), 1, 1]]),
    ("input_sizes", [None, None]), ("configs", [1]), ("configs", [None]), ("configs", []), ("version", 1.0), ("sites", "a"),
    ("model_args", {"num_classes": 10**13}), ("model_args", {"pretrained_strict": False}), ("model_args", []),
    ("architecture", "local-dir:/etc"), ("architecture", 5)])  # fmt: skip
def test_a_recipe_of_strange_values_gives_our_error(tmp_path, written, field, value):
    _, state, recipe = written
    save_file(state, tmp_path / "m.safetensors", metadata={"se_inject": json.dumps({**recipe, field: value})})
    with pytest.raises(se_inject.SEInjectError):
        se_inject.load(tmp_path / "m.safetensors")


def test_what_is_no_file_of_weights_gives_our_error(tmp_path, written):
    _, state, recipe = written
    deep = "[" * 100_000
    save_file(state, tmp_path / "deep.safetensors", metadata={"se_inject": deep})
    (tmp_path / "deep.safetensors.index.json").write_text(deep)
    (tmp_path / "config.json").write_text(deep)
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save({0: torch.zeros(1)}, tmp_path / "number.pth")
    quantized = {k: t.to(torch.int8) if k.endswith(".weight") else t for k, t in state.items()}
    save_file(quantized, tmp_path / "int8.safetensors", metadata={"se_inject": json.dumps(recipe)})
    for path in (*tmp_path.iterdir(), tmp_path):
        with pytest.raises(WeightsError):
            se_inject.load(path, "test_resnet")


def test_a_tensor_is_read_from_the_shard_that_the_index_names(tmp_path, written):
    model, _, _ = written
    x = torch.randn(1, 3, 64, 64)
    se_inject.save(model, tmp_path / "m.safetensors", max_shard_size="500KB")
    index = json.loads((tmp_path / "m.safetensors.index.json").read_text())["weight_map"]
    first, last = min(index.values()), max(index.values())
    stale = {k: torch.zeros_like(model.state_dict()[k]) for k, name in index.items() if name == first}
    save_file({**load_file(tmp_path / last), **stale}, tmp_path / last)
    assert torch.equal(se_inject.load(tmp_path / "m.safetensors")(x), model(x))


def test_a_head_alone_goes_over_a_model_with_weights(tmp_path, written):
    model, state, _ = written
    se_inject.save(model, tmp_path / "head.safetensors", only="head")
    for name in ("test_resnet", "se_inject/test_resnet"):
        given = randomise(timm.create_model(name), seed=5)
        before = {k: t.clone() for k, t in given.state_dict().items()}
        after = se_inject.load(tmp_path / "head.safetensors", given).state_dict()
        assert all(torch.equal(after[k], state[k] if k.startswith("fc.") else before[k]) for k in before)
    with pytest.raises(RuntimeError, match="Missing key"):  # as for any model
        given.load_state_dict(load_file(tmp_path / "head.safetensors"))


def test_a_model_with_a_part_called_module(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = timm.create_model("test_resnet")

        def forward(self, x):
            return self.module(x)

    model = randomise(se_inject.inject(Net())).eval()
    se_inject.save(model, tmp_path / "m.safetensors")
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(se_inject.load(tmp_path / "m.safetensors", Net()).eval()(x), model(x))


def test_a_feature_wrapper_comes_back(tmp_path):
    def net():
        return timm.create_model("test_resnet", features_only=True, out_indices=(2, 4)).eval()

    model, path = randomise(se_inject.inject(net())).eval(), tmp_path / "m.safetensors"
    se_inject.save(model, path)
    x = torch.randn(1, 3, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(se_inject.load(path, net())(x), model(x), strict=True))


@pytest.mark.parametrize("kwargs, message", [
    ({"metadata": {"epoch": 3}}, r"metadata\['epoch'\] is 3"), ({"max_shard_size": None}, "max_shard_size=None"),
    ({"only": 5}, "only=5"), ({"only": [["se"]]}, "only="), ({"path": ""}, "is a folder"), ({"path": "."}, "is a folder")])
def test_what_save_cannot_do(tmp_path, monkeypatch, written, kwargs, message):
    monkeypatch.chdir(tmp_path)
    for size in ({}, {"max_shard_size": "500KB"}):
        with pytest.raises(se_inject.SEInjectError, match=message):
            se_inject.save(written[0], **{"path": "m.safetensors", **size, **kwargs})
    assert not list(tmp_path.iterdir())


def test_a_state_that_is_no_tensor(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = timm.create_model("test_resnet")

        def forward(self, x):
            return self.body(x)

        def get_extra_state(self):
            return {"epoch": 1}

        def set_extra_state(self, state):
            pass

    with pytest.raises(WeightsError, match=r"no tensors.*torch\.save"):
        se_inject.save(se_inject.inject(Net()), tmp_path / "m.safetensors")


def test_a_base_of_another_architecture_is_refused(tmp_path):
    for name, part in {"efficientnet_lite0": "se", "tf_efficientnet_lite0": None}.items():  # equal shapes, other padding
        se_inject.save(timm.create_model(f"se_inject/{name}"), tmp_path / name, only=part)
    files = tmp_path / "efficientnet_lite0", tmp_path / "tf_efficientnet_lite0"
    with pytest.raises(WeightsError, match="is of efficientnet_lite0, and base="):
        se_inject.load(files[0], base=files[1])
    assert block_paths(se_inject.load(files[0], "tf_efficientnet_lite0", base=files[1]))


def test_options_of_several_injections_belong_to_their_sites(tmp_path):
    def net(first, second):
        model = se_inject.inject(timm.create_model("test_resnet"), stages=1, rd_channels=8, act_layer=first)
        return se_inject.inject(model, stages=(2, 3, 4), rd_channels=8, act_layer=second)

    model = randomise(net("silu", "relu")).eval()
    se_inject.save(model, tmp_path / "m.safetensors")
    assert torch.equal(out(se_inject.load(tmp_path / "m.safetensors", net("silu", "relu"))), out(model))
    with pytest.raises(WeightsError, match="blocks were made with"):
        se_inject.load(tmp_path / "m.safetensors", net("relu", "silu"))


def test_a_base_file_without_base_weights_is_an_error(tmp_path):
    """Otherwise the model would keep the random base that was built for the weights."""
    net = se_inject.inject(timm.create_model("resnet18"))
    se_inject.save(net, tmp_path / "se.safetensors", only="se")
    se_inject.save(net, tmp_path / "both.safetensors", only=("se", "head"))
    for kind in ("se", "both"):
        for base in ("se", "both"):
            with pytest.raises(WeightsError, match=r"no weights of the base|none would be taken from there"):
                se_inject.load(tmp_path / f"{kind}.safetensors", base=tmp_path / f"{base}.safetensors")
        tensors = load_file(tmp_path / f"{kind}.safetensors")
        torch.save(tensors, tmp_path / "plain.pth")
        with pytest.raises(WeightsError, match="no weights of the base"):
            se_inject.load(tmp_path / "plain.pth", "resnet18")
        into = se_inject.load(tmp_path / "plain.pth", se_inject.inject(timm.create_model("resnet18")))  # which has weights
        assert all(torch.equal(into.state_dict()[k], t) for k, t in tensors.items())


class _Loads(nn.Sequential):
    def _load_from_state_dict(self, *args):
        self.said.append(1)
        super()._load_from_state_dict(*args)


@pytest.mark.parametrize("own", [
    lambda m: m.layer2.register_load_state_dict_post_hook(lambda module, _: module.said.append(1)),
    lambda m: m.layer2.register_load_state_dict_pre_hook(lambda module, *_: module.said.append(1)),
    lambda m: setattr(m.layer2, "__class__", _Loads),
    lambda m: m.register_state_dict_post_hook(
        lambda module, state, *_: module.layer2.said.append(state.update({k: t.clone() for k, t in state.items()})))],
    ids=["post hook", "pre hook", "method", "copies"])
def test_a_module_with_its_own_way_to_load_is_asked(tmp_path, own):
    written = randomise(se_inject.inject(timm.create_model("resnet18")))
    se_inject.save(written, tmp_path / "m.safetensors")
    model = se_inject.inject(timm.create_model("resnet18"))
    model.layer2.said = []
    own(model)
    se_inject.load(tmp_path / "m.safetensors", model)
    assert model.layer2.said
    assert all(torch.equal(t, model.state_dict()[k]) for k, t in written.state_dict().items())


def test_a_model_without_memory_is_refused(tmp_path):
    se_inject.save(se_inject.inject(timm.create_model("resnet18")), tmp_path / "m.safetensors")
    with torch.device("meta"):
        model = timm.create_model("resnet18")
    with pytest.raises(WeightsError, match="on the meta device, without memory"):
        se_inject.load(tmp_path / "m.safetensors", model)
    assert not block_paths(model)
