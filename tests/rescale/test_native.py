"""Back to timm's own models with attention: strict loads, equal outputs, and a clear answer if there is no such model."""

import json
import re
import subprocess
import sys

import pytest
import timm
import torch
from click.testing import CliRunner
from safetensors import safe_open

import se_inject
from se_inject.cli import main
from se_inject.surgery.state import block_paths

from ..contract.test_twins import TWINS
from ..support.checks import randomise
from ..support.versions import needs_model_args

# `python -m tests.rescale.test_native` checks all pairs; the tests check one for each file of timm's and each block.
SOME = {
    "seresnet18", "ecaresnet26t", "nf_seresnet26", "nf_ecaresnet26", "regnety_002", "efficientnet_b0", "sedarknet21",
    "seresnet33ts", "eca_resnext26ts", "gcresnext26ts", "ese_vovnet39b", "eca_vovnet39b"}
CHOSEN = [t for t in TWINS if t[0] in SOME]
QUICK = {"seresnet18", "ecaresnet26t", "nf_seresnet26", "regnety_002", "efficientnet_b0", "gcresnext26ts"}


def test_one_of_each_kind_is_chosen():
    def kinds(twins):
        return {(timm.models._registry._model_to_module[base], block) for _, block, base, _, _ in twins}

    assert kinds(CHOSEN) == kinds(TWINS)


def trained(base, block, args, options):
    """A twin's base with blocks of init="identity", and weights as after training."""
    model = randomise(timm.create_model(f"se_inject/{base}", se_block=block, **args, **options))
    generator = torch.Generator().manual_seed(1)
    for path in block_paths(model):
        for p in model.get_submodule(path).parameters():
            p.data.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


def check(native, block, base, args, options):
    model = trained(base, block, args, options)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    modes, rng = [m.training for m in model.modules()], torch.get_rng_state()
    weights = se_inject.to_native(model)
    assert torch.equal(torch.get_rng_state(), rng) and [m.training for m in model.modules()] == modes
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)
    theirs = timm.create_model(weights.architecture, **weights.model_args)
    theirs.load_state_dict(weights, strict=True)
    x = torch.randn(2, 3, 64, 64)
    for training in (False, True):
        model.train(training)
        theirs.train(training)
        torch.manual_seed(1)
        expected = model(x)
        torch.manual_seed(1)
        assert torch.equal(theirs(x), expected)
    return weights


def test_a_frozen_base_stays_frozen_and_has_its_twin():
    model = se_inject.freeze_base(randomise(timm.create_model("se_inject/resnet18")))
    model.train()
    modes, learn = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    weights = se_inject.to_native(model)
    assert weights.architecture == "seresnet18"
    assert [m.training for m in model.modules()] == modes and [p.requires_grad for p in model.parameters()] == learn
    native = timm.create_model("seresnet18").eval()
    native.load_state_dict(weights, strict=True)
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(native(x), model.eval()(x))
    se_inject.unfreeze_base(model.train())
    assert all(m.training for m in model.modules()) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("native, block, base, args, options", [
    pytest.param(*twin, id=twin[0], marks=[] if twin[0] in QUICK else pytest.mark.contract) for twin in CHOSEN])
def test_native_twin(native, block, base, args, options):
    assert check(native, block, base, args, options).architecture == native


def test_the_factor_is_in_the_norm_and_the_first_layer():
    model = trained("resnet18", "se", {}, {})
    weights, own = se_inject.to_native(model), model.state_dict()
    for key in own:
        factor = 2 if key.endswith(("bn2.weight", "bn2.bias")) else 0.5 if key.endswith("se.fc1.weight") else 1
        assert torch.equal(weights[key], own[key] * factor), key


@needs_model_args
@pytest.mark.contract
def test_a_file_that_plain_timm_loads(tmp_path):
    model = trained("resnet18", "se", {"num_classes": 7, "in_chans": 1}, {}).eval()
    source, out = tmp_path / "ours.safetensors", tmp_path / "native.safetensors"
    se_inject.save(model, source)
    result = CliRunner().invoke(main, ["to-native", str(source), "-o", str(out)])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said == {"architecture": "seresnet18", "model_args": {"num_classes": 7, "in_chans": 1}, "file": str(out)}
    with safe_open(out, "pt") as f:
        assert f.metadata()["architecture"] == "seresnet18"
    x = torch.randn(2, 1, 64, 64)
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, timm, torch\n"
        "m = timm.create_model('seresnet18', num_classes=7, in_chans=1, checkpoint_path=sys.argv[1]).eval()\n"
        "torch.set_num_threads(1)\n"
        "torch.save(m(torch.load(sys.argv[2])).detach(), sys.argv[3])\n"
        "assert 'se_inject' not in sys.modules")
    subprocess.run([sys.executable, "-c", code, str(out), str(tmp_path / "x.pt"), str(tmp_path / "y.pt")], check=True)
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "y.pt"), model(x))


def test_weights_are_a_state_dict_of_their_own(tmp_path):
    model = trained("resnet18", "se", {}, {})
    weights = se_inject.to_native(model)
    own = {t.data_ptr() for t in model.state_dict().values()}
    assert not own & {t.data_ptr() for t in weights.values()}
    torch.save(weights, tmp_path / "native.pth")  # no class of se_inject is in the pickle
    timm.create_model(weights.architecture, checkpoint_path=str(tmp_path / "native.pth"))


@needs_model_args
def test_the_twin_updates_its_statistics_alike():
    model = timm.create_model("se_inject/efficientnet_lite0", act_layer="silu", bn_momentum=0.01, num_classes=3)
    weights = se_inject.to_native(model)
    assert weights.architecture == "efficientnet_b0" and weights.model_args["bn_momentum"] == 0.01


def test_without_a_factor_the_weights_are_the_same():
    model = timm.create_model("se_inject/resnet18", se_init="timm")
    weights = se_inject.to_native(model)
    assert all(torch.equal(t, weights[k]) for k, t in model.state_dict().items())


@pytest.mark.parametrize("make, messages", [
    (lambda: se_inject.inject(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())),
     ["not made by timm"]),
    (lambda: timm.create_model("se_inject/resnet18", se_ratio=1 / 4),
     ["is seresnet18, which has another shape of layer1.0.se.fc1.weight and 23 more", "ratio=0.25"]),
    (lambda: timm.create_model("se_inject/resnet18", se_placement="standard"),
     ["None of those tried has blocks in these places", "placement='standard'"]),
    (lambda: randomise(timm.create_model("se_inject/resnet18", se_act_layer="silu")),
     ["These tensors, but other outputs: seresnet18", "act_layer='silu'"]),
    (lambda: timm.create_model("se_inject/resnet18", se_block="cbam"), ["the factor 2 .* does not go into the weights"]),
], ids=["own", "ratio", "placement", "act", "cbam"])
def test_what_has_no_twin(make, messages, monkeypatch):
    monkeypatch.setattr("se_inject.rescale.native._candidates", lambda base: (["resnet26", "seresnet18"], ["nf_resnet26"]))
    check_no_twin(make(), messages)


@pytest.mark.contract
def test_all_candidates_are_tried_before_the_error():
    check_no_twin(timm.create_model("se_inject/resnet18", se_stages=(3,)), [
        "no model with these", "is seresnet18, which also has layer1.0.se.fc1.weight and 23 more", r"stages=\[3\]",
        r"the \d\d other models in the same file"])


def check_no_twin(model, messages):
    keys = list(model.state_dict())
    with pytest.raises(se_inject.SEInjectError) as error:
        se_inject.to_native(model)
    for message in messages:
        assert re.search(message, str(error.value)), error.value
    assert list(model.state_dict()) == keys


if __name__ == "__main__":
    for twin in TWINS:
        print(*twin[:3], check(*twin).architecture, flush=True)
