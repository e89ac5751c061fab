"""Prefixes of names in files of others: taken off where the names then are the model's, and nowhere else."""

from __future__ import annotations

import fractions
import logging

import pytest
import timm
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import nn

import se_inject
from se_inject.cli import main
from se_inject.errors import WeightsError
from se_inject.surgery.parts import Parts
from se_inject.surgery.prefixes import certain_prefix, common_prefixes, likely_prefix, prefix_of_some

from ..support.checks import randomise
from ..support.outputs import out


@pytest.fixture(scope="module")
def trained():
    """An injected model, what it computes, and its state dict."""
    model = randomise(timm.create_model("se_inject/test_resnet", num_classes=7, se_ratio=0.25)).eval()
    return model, out(model), model.state_dict()


def renamed(state, prefix):
    return {prefix + key: t for key, t in state.items()}


def fresh(**args):
    return timm.create_model("se_inject/test_resnet", num_classes=7, se_ratio=0.25, **args)


@pytest.mark.parametrize("prefix, suffix", [
    ("backbone.", "ckpt"), ("encoder.model.", "safetensors"), ("module.net._orig_mod.", "ckpt"), ("layer1.", "safetensors")])
def test_any_common_prefix_comes_off_by_every_door(trained, prefix, suffix, tmp_path, caplog):
    _, y, state = trained
    caplog.set_level(logging.INFO, "se_inject")
    of_base, of_blocks = ({k: t for k, t in state.items() if (".se." in k) is blocks} for blocks in (False, True))

    def write(name, tensors):
        path = tmp_path / f"{name}.{suffix}"
        tensors = renamed(tensors, prefix)
        if suffix == "ckpt":
            torch.save({"state_dict": tensors, "pytorch-lightning_version": "2.6.0"}, path)
        else:
            save_file(tensors, path)
        return path

    path, base, se = write("full", state), write("base", of_base), write("se", of_blocks)
    assert torch.equal(out(se_inject.load(path, "test_resnet", ratio=0.25)), y)
    assert [m for m in caplog.messages if "taken off" in m] == [f"{path}: the prefix {prefix!r} is taken off all names"]
    assert torch.equal(out(se_inject.load(path, fresh())), y)
    assert torch.equal(out(se_inject.load(se, fresh(), base=base)), y)
    assert torch.equal(out(fresh(checkpoint_path=str(path))), y)
    assert torch.equal(out(fresh(pretrained=True, pretrained_cfg_overlay={"file": str(path), "num_classes": 7})), y)

    given = fresh()
    caplog.clear()
    given.load_state_dict(renamed(state, prefix))
    assert torch.equal(out(given), y) and any("taken off all" in m for m in caplog.messages)
    given = fresh()
    given.load_state_dict(of_base)
    given.load_state_dict(renamed(of_blocks, prefix))
    assert torch.equal(out(given), y)


def test_the_command(trained, tmp_path):
    state = trained[2]
    torch.save({"state_dict": renamed(state, "model."), "arch": "se_inject/test_resnet"}, tmp_path / "a.ckpt")
    plain = {k: t for k, t in state.items() if ".se." not in k}
    torch.save({"state_dict": renamed(plain, "net.model.")}, tmp_path / "base.ckpt")

    def call(*args):
        done = CliRunner().invoke(main, ["-q", *map(str, args)], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    assert "blocks: 4" in call("info", tmp_path / "a.ckpt")
    call("eject", tmp_path / "a.ckpt", "-o", tmp_path / "o.safetensors", "--ratio", 0.25)
    assert load_file(tmp_path / "o.safetensors").keys() == plain.keys()
    call("inject", tmp_path / "base.ckpt", "--model", "test_resnet", "-o", tmp_path / "i.safetensors")
    assert se_inject.load(tmp_path / "i.safetensors").num_classes == 7
    assert "4 sites" in call("plan", tmp_path / "base.ckpt", "--model", "test_resnet")


class Wrapper(nn.Module):
    """A model with a child that has the name of a prefix."""

    def __init__(self, name="model"):
        super().__init__()
        self.add_module(name, timm.create_model("test_resnet", num_classes=7))
        self.name = name

    def forward(self, x):
        return self.get_submodule(self.name)(x)


@pytest.mark.parametrize("name, prefix", [
    ("model", ""), ("model", "model."), ("module", ""), ("module", "module."), ("_orig_mod", "net.model._orig_mod.")])
def test_a_prefix_that_is_also_a_child(name, prefix, tmp_path):
    model = randomise(se_inject.inject(Wrapper(name), input_size=(3, 64, 64))).eval()
    torch.save(renamed(model.state_dict(), prefix), tmp_path / "a.pth")
    given = se_inject.inject(Wrapper(name), input_size=(3, 64, 64))
    expected = out(model)
    assert torch.equal(out(se_inject.load(tmp_path / "a.pth", given)), expected)
    randomise(given, seed=9)
    given.load_state_dict(torch.load(tmp_path / "a.pth"))
    assert torch.equal(out(given), expected)


def test_names_that_fit_stay():
    """Also where they would fit without a prefix."""
    class Nested(nn.Module):
        def __init__(self, depth=2):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))
            if depth:
                self.model = Nested(depth - 1)

    parts = Parts.of(Nested())
    assert certain_prefix(["model.weight"], parts) == likely_prefix(["model.weight"], parts.base) == ""
    whole = [f"model.{key}" for key in parts.base]  # two of three names fit as they are, all fit without it
    assert certain_prefix(whole, parts) == likely_prefix(whole, parts.base) == "model."
    assert common_prefixes(["a.b.c", "a.b.d", "a.bc.d"]) == ["", "a."] and common_prefixes([]) == common_prefixes(["a"]) == [""]
    assert prefix_of_some(["net.model.weight", "net.weight", "x.y"], parts.base) == "net."
    assert prefix_of_some(["x.y", "z"], parts.base) is None


def test_a_part_with_a_prefix_is_refused_with_the_line_that_selects_it(trained, tmp_path):
    state = trained[2]
    torch.save({"state_dict": {**renamed(state, "model."), "criterion.weight": torch.ones(7)}}, tmp_path / "a.ckpt")
    given = fresh()
    before = {k: t.clone() for k, t in given.state_dict().items()}
    with pytest.raises(WeightsError, match=r"'model\.' are the model's, and 1 others are not \(criterion\.weight\)") as error:
        se_inject.load(tmp_path / "a.ckpt", given)
    assert all(torch.equal(t, before[k]) for k, t in given.state_dict().items())
    line = "{" + str(error.value).partition("write {")[2].partition("}")[0] + "}"
    chosen = eval(line, {"state_dict": torch.load(tmp_path / "a.ckpt")["state_dict"]})
    assert chosen.keys() == state.keys()
    with pytest.raises(RuntimeError, match="Missing key"):
        given.load_state_dict(torch.load(tmp_path / "a.ckpt")["state_dict"])
    torch.save({**renamed(state, "model."), **renamed(state, "ema_model.")}, tmp_path / "two.pth")
    with pytest.raises(WeightsError, match="does not fit"):
        se_inject.load(tmp_path / "two.pth", given)


def test_a_file_that_does_not_fit_is_refused_without_its_prefix(trained, tmp_path):
    state = {k: t for k, t in trained[2].items() if ".se." not in k and k != "conv1.0.weight"}
    torch.save(renamed(state, "model."), tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"1 missing \(conv1\.0\.weight\)"):
        se_inject.load(tmp_path / "a.pth", fresh())
    with pytest.raises(RuntimeError, match="Missing key"):
        fresh().load_state_dict(renamed(state, "model."))
    torch.save(renamed(trained[2], "model."), tmp_path / "b.pth")
    with pytest.raises(WeightsError, match=r"fc\.weight: \(7, \d+\) in the file"):
        se_inject.load(tmp_path / "b.pth", timm.create_model("se_inject/test_resnet", num_classes=3, se_ratio=0.25))


class Evil:
    def __reduce__(self):
        return eval, ("__import__('se_inject').ran",)


def test_objects_beside_the_weights_are_not_made(trained, tmp_path):
    _, y, state = trained
    objects = [fractions.Fraction(1, 3), Wrapper, Evil(), fresh, nn.ReLU()]
    torch.save({"state_dict": renamed(state, "model."), "hyper_parameters": {"a": objects}}, tmp_path / "a.ckpt")
    assert torch.equal(out(se_inject.load(tmp_path / "a.ckpt", fresh())), y)
    torch.save({"state_dict": {**state, "fc.weight": Evil()}}, tmp_path / "b.ckpt")
    with pytest.raises(WeightsError, match=r"holds no state dict \('fc\.weight'\)"):
        se_inject.load(tmp_path / "b.ckpt", fresh())
    torch.save(nn.Linear(2, 2), tmp_path / "c.ckpt")
    with pytest.raises(WeightsError, match="no pickled code is run"):
        se_inject.load(tmp_path / "c.ckpt", fresh())
