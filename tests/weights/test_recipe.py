"""Bad files give one error and change nothing, and no text of a recipe is run."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import se_inject
from se_inject.errors import WeightsError
from se_inject.weights.reading import read_checkpoint

from ..support.processes import fresh


def bad(tmp_path, kind):
    model = se_inject.inject(timm.create_model("test_resnet"))
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
    ("path", "checkpoint_path='/etc/passwd'"), ("argument", "cannot create 'test_resnet'"),
    ("sites", "its options lead to 1 blocks")])  # fmt: skip
def test_bad_files_give_one_error_and_change_nothing(tmp_path, kind, message):
    path = bad(tmp_path, kind)
    with pytest.raises(se_inject.SEInjectError, match=message):
        se_inject.load(path, **({"model": "test_resnet"} if kind == "pickle" else {}))
    given = timm.create_model("test_resnet")
    before = {k: t.clone() for k, t in given.state_dict().items()}
    if kind not in ("architecture", "argument"):  # a given model does not need it
        with pytest.raises(se_inject.SEInjectError, match=message):
            se_inject.load(path, given)
        after = given.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.xdist_group("processes")
def test_no_text_of_a_recipe_is_run_or_imported(tmp_path):
    """Each string of a recipe is replaced by one that Python's audit hook would report if it were compiled or imported."""
    model = timm.create_model("se_inject/test_resnet", se_act_layer="silu", se_include="layer*")
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
    arguments = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    done = fresh(code, *arguments)
    assert done.returncode == 0, done.stderr
    seen, outcomes = json.loads(done.stdout)
    assert seen == 0 and len(outcomes) >= 18
    assert all(outcome == "refused" for _, outcome in outcomes), outcomes


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
