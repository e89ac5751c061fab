"""The command: real weights in and out, output that pipes, exit codes."""

import argparse
import json
import pathlib
import re
import subprocess
import sys
import tempfile

import pytest
import timm
import torch
import torchvision
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file, save_file

import se_inject
from se_inject.cli import main
from se_inject.tools import demo

from ..support.checks import randomise


def call(*args: object, code: int = 0) -> tuple[str, str]:
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


def test_help_imports_no_torch():
    code = ("import sys; from se_inject.cli import main\n"
            "try: main(['inject', '--help'])\nexcept SystemExit: pass\nprint('torch' in sys.modules, 'timm' in sys.modules)")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "False False" and "--ratio" in out


def test_only_the_command_imports_click_and_rich():
    package = pathlib.Path(se_inject.__file__).parent
    importing = {
        path.relative_to(package).parts[0] for path in package.rglob("*.py")
        if re.search(r"^\s*(import|from) (click|rich)\b", path.read_text(), re.MULTILINE)}
    assert importing == {"cli"}


def test_no_help_text_is_cut_at_80_columns():
    out = CliRunner().invoke(main, ["--help"], terminal_width=80).stdout
    commands = out.partition("Commands:\n")[2].splitlines()
    assert [line.split()[0] for line in commands] == sorted(main.commands)
    assert all(len(line) <= 80 and not line.endswith("...") for line in commands)


def test_lite0_file_in_file_out(tmp_path):
    base = demo.base_model()
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        y = base(x)
    source, injected, ejected = (tmp_path / f"{n}.safetensors" for n in ("base", "injected", "ejected"))
    save_file(base.state_dict(), source)
    out, err = call("inject", source, "--model", "tf_efficientnet_lite0", "-o", injected, "--ratio", 0.5)
    assert out.strip() == str(injected)
    count = se_inject.plan("tf_efficientnet_lite0", ratio=0.5).added_params
    assert "296 base tensors loaded, 64 SE tensors at identity" in err
    assert f"16 blocks injected, with {count:,} parameters" in err
    model = timm.create_model("se_inject/tf_efficientnet_lite0", se_ratio=0.5, checkpoint_path=str(injected)).eval()
    with torch.no_grad():
        assert torch.equal(model(x), y)
        assert torch.equal(se_inject.load(injected)(x), y)
    said = json.loads(call("info", injected, "--json")[0])
    assert said["architecture"] == "tf_efficientnet_lite0" and said["configs"] == [{"ratio": 0.5}]
    assert said["tensors"] == {"base": 296, "se": 64} and len(said["sites"]) == 16
    call("eject", injected, "-o", ejected)
    again, first = load_file(ejected), load_file(source)
    assert again.keys() == first.keys() and all(torch.equal(again[k], first[k]) for k in first)
    assert "already holds" in call("inject", injected, "-o", tmp_path / "x", code=1)[1]
    assert not (tmp_path / "x").exists()


def test_training_checkpoints_and_folders(tmp_path):
    model = timm.create_model("resnet18", num_classes=3).eval()
    file = tmp_path / "model_best.pth.tar"
    torch.save({"arch": "resnet18", "state_dict": {f"module.{k}": t for k, t in model.state_dict().items()}}, file)
    timm.models._hub.save_for_hf(model, tmp_path / "folder", safe_serialization=True)
    x = torch.randn(1, 3, 64, 64)
    for source in (file, tmp_path / "folder"):
        call("inject", source, "-o", tmp_path / "o.safetensors")
        with torch.no_grad():
            assert torch.equal(se_inject.load(tmp_path / "o.safetensors")(x), model(x))
        assert "8 sites" in call("plan", source)[0]


def test_info_knows_the_blocks_of_a_training_checkpoint(tmp_path):
    model, file = timm.create_model("se_inject/resnet18", se_ratio=0.125), tmp_path / "last.pth.tar"
    args = argparse.Namespace(model_kwargs={"se_ratio": 0.125})
    torch.save({"arch": "se_inject/resnet18", "state_dict": model.state_dict(), "args": args}, file)
    out, err = call("info", file, "--json")
    said = json.loads(out)
    blocks = [k for k in model.state_dict() if ".se." in k]
    assert said["content"] == "full" and said["configs"] == [{"ratio": 0.125}] and not err
    assert said["tensors"] == {"base": len(model.state_dict()) - len(blocks), "se": len(blocks)}
    assert said["sites"] == list(dict.fromkeys(k.split(".se.")[0] + ".se" for k in blocks))
    base = {k: t for k, t in model.state_dict().items() if k not in blocks}
    torch.save({"arch": "se_inject/resnet18", "state_dict": base}, file)
    assert json.loads(call("info", file, "--json")[0])["content"] == "base"


def test_what_timms_training_gives_to_a_model_beside_its_arguments(tmp_path):
    model = randomise(timm.create_model("test_efficientnet", global_pool="max", bn_eps=0.1)).eval()
    args = argparse.Namespace(gp="max", bn_eps=0.1, bn_momentum=None, model_kwargs={})
    torch.save({"arch": "test_efficientnet", "state_dict": model.state_dict(), "args": args}, tmp_path / "last.pth.tar")
    call("inject", tmp_path / "last.pth.tar", "-o", tmp_path / "o.safetensors")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(se_inject.load(tmp_path / "o.safetensors")(x), model(x))


@pytest.mark.contract
def test_demo(tmp_path):
    out, err = call("demo", "-o", tmp_path / "d.safetensors", "--json")
    said = json.loads(out)
    photos = {p["name"]: p for p in said["photos"]}
    assert len(photos) >= 5 and all(p["exact"] and p["before"] == p["after"] for p in photos.values())
    assert photos["coffee"]["before"] == "espresso" and photos["coffee"]["p_before"] == pytest.approx(0.95, abs=0.01)
    assert photos["china"]["before"] == "palace" and photos["rocket"]["before"] == "missile"
    assert "16 sites" in err and (tmp_path / "d.safetensors").exists()
    head, blocks = said["training"]["runs"]
    assert blocks["accuracy"] > head["accuracy"] > 60 and blocks["numbers"] - head["numbers"] == 636540
    assert said["figure"] == str(tmp_path / "d.gates.png")
    with Image.open(said["figure"]) as figure:
        assert figure.size[0] > 1000


def test_the_demo_leaves_nothing_in_the_working_folder(tmp_path, monkeypatch):
    work, temporary = tmp_path / "work", tmp_path / "temporary"
    work.mkdir()
    temporary.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr("se_inject.tools.demo_training.STEPS", 2)
    out, err = call("demo")
    (file,), (figure,) = temporary.glob("*/*.safetensors"), temporary.glob("*/*.png")
    assert f"saved {file}" in err and not list(work.iterdir())
    assert out.splitlines()[0].split() == ["photograph", "base", "p", "se_inject/tf_efficientnet_lite0", "p", "logits"]
    assert "\n7 photographs: the logits are bit-exact on all photographs\n" in out
    assert out.splitlines()[-2:] == [f"the model: {file}", f"the gates after training: {figure}"]


def test_plan_and_list():
    assert call("list", "resnet18*")[0].split() == timm.list_models("se_inject/resnet18*")
    assert json.loads(call("list", "resnet18", "--pretrained", "--json")[0]) == timm.list_pretrained("se_inject/resnet18")
    said = json.loads(call("plan", "resnet18", "--ratio", 0.5, "--stages", 1, "--stages", 2, "--json")[0])
    assert said == se_inject.plan("resnet18", ratio=0.5, stages=(1, 2)).to_dict()
    assert call("plan", "resnet18")[0].strip() == str(se_inject.plan("resnet18"))


def test_inject_by_name(tmp_path):
    _, err = call("inject", "resnet18", "-o", tmp_path / "a.safetensors", "--only-se")
    assert "random weights" in err
    assert set(load_file(tmp_path / "a.safetensors")) == {
        k for k in timm.create_model("se_inject/resnet18").state_dict() if ".se." in k}
    assert call("-q", "inject", "resnet18", "-o", tmp_path / "a.safetensors")[1] == ""


@pytest.mark.parametrize("args, code, message", [
    (["plan", "resnet5O"], 2, "did you mean 'resnet50'"),
    (["plan", "resnet18", "--ratio", "16"], 2, "write ratio=1/16"),
    (["plan", "resnet18", "--placement", "inside"], 2, "inside"),
    (["inject", "resnet18"], 2, "-o"),
    (["info", "none.safetensors"], 1, "no file"),
    (["inject", "base.safetensors", "-o", "x.safetensors", "--pretrained"], 2, "leave --pretrained out"),
    (["inject", "seresnet18", "-o", "x.safetensors"], 1, "already have channel attention"),
    (["list", "nothing_like_it*"], 1, "no model"),
])  # fmt: skip
def test_what_goes_wrong(args, code, message):
    out, err = call(*args, code=code)
    assert message in err and out == ""


def test_an_ejected_base_says_with_which_arguments_it_was_made(tmp_path):
    model = randomise(timm.create_model("se_inject/test_resnet", act_layer="silu", num_classes=3)).eval()
    se_inject.save(model, tmp_path / "a.safetensors")
    call("eject", tmp_path / "a.safetensors", "-o", tmp_path / "base.safetensors")
    call("inject", tmp_path / "base.safetensors", "-o", tmp_path / "b.safetensors")
    base, x = se_inject.eject(model), torch.randn(1, 3, 64, 64)
    assert torch.equal(se_inject.load(tmp_path / "b.safetensors")(x), base(x))


@pytest.mark.parametrize("argument, message", [
    ("block=foo", "cannot create 'test_resnet'"), ("act_layer=zzz", "cannot create 'test_resnet'"),
    ("pretrained=True", "write --pretrained"), ("checkpoint_path=/etc/passwd", "write --pretrained")])
def test_arguments_that_timm_does_not_take(tmp_path, argument, message):
    err = call("inject", "test_resnet", "-o", tmp_path / "x", "--model-kwargs", argument, code=2)[1]
    assert message in err.replace("\n", " ")
    assert not list(tmp_path.iterdir())


def test_every_command_of_a_file_takes_its_name_and_arguments(tmp_path):
    """A state dict of plain torch says neither; the options do."""
    model = randomise(timm.create_model("se_inject/test_resnet", se_init="timm", act_layer="silu", num_classes=3)).eval()
    torch.save(model.state_dict(), tmp_path / "a.pth")
    args = [tmp_path / "a.pth", "--model", "se_inject/test_resnet", "--model-kwargs", "act_layer=silu"]
    call("eject", *args, "-o", tmp_path / "base.safetensors", "--init", "timm")
    base, x = timm.create_model("test_resnet", act_layer="silu", num_classes=3).eval(), torch.randn(1, 3, 64, 64)
    base.load_state_dict(load_file(tmp_path / "base.safetensors"))
    assert torch.equal(base(x), se_inject.eject(model)(x))


def test_there_is_no_base_to_write(tmp_path):
    base = tmp_path / "base.safetensors"
    base.write_bytes(b"before")
    model = se_inject.inject(torchvision.models.shufflenet_v2_x0_5(), input_size=(3, 64, 64))
    se_inject.save(model, tmp_path / "se.safetensors", only="se")
    assert "holds the blocks alone" in call("eject", tmp_path / "se.safetensors", "-o", base, code=1)[1].replace("\n", " ")
    torch.save(randomise(timm.create_model("seresnet18")).state_dict(), tmp_path / "se.pth")
    said = call("eject", tmp_path / "se.pth", "--model", "seresnet18", "--existing", "replace", "-o", base, code=1)[1]
    assert "or of the block that replaces it" in said.replace("\n", " ")
    assert base.read_bytes() == b"before"
