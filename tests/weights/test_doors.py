"""Every door loads every kind of file; docs/doors.md has the table of results."""

import pathlib
import re
import shutil

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import clean_state_dict

import se_inject
from se_inject.surgery.parts import Parts

from ..cli.test_cli import call
from ..support.checks import channels_of, randomise
from ..support.versions import needs_local_dir, needs_safetensors_in_torch_load

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "doors.md"
# each with a filter of checkpoints of its own
FAMILIES = {
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (16, 16, 32, 32)},
    "vit_tiny_patch16_224": {"img_size": 64, "depth": 1, "embed_dim": 48}}
NORMED = {"test_resnet": {}}  # with statistics, which the others lack
SIZES = {"num_classes": 3, "in_chans": 1}
FORMATS = {".safetensors": save_file, ".pth": torch.save, ".ckpt": torch.save}


def images(channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, 64, 64, generator=torch.Generator().manual_seed(0))


def out(model):
    model = model.float().eval()
    with torch.no_grad():
        return model(images(channels_of(model)))


class Kind:
    """A kind of file: its name in the table, how it is written, and the outputs that it must give."""

    def __init__(self, content: str, suffix: str, dtype: torch.dtype | None = None, wrap: str = "", sizes: bool = False,
                 families: dict[str, dict] = FAMILIES):
        self.families = families
        self.content, self.suffix, self.dtype, self.wrap, self.sizes = content, suffix, dtype, wrap, sizes
        notes = (wrap, str(dtype).removeprefix("torch.") if dtype else "", "3 classes, 1 channel" if sizes else "")
        self.title = ", ".join(filter(None, (f"{content} {suffix}", *notes)))

    def write(self, folder, name):
        """Write the file; return its path, the weights of the base, and the outputs of the model."""
        args = {**self.families[name], **(SIZES if self.sizes else {})}
        model = randomise(timm.create_model(f"se_inject/{name}", se_ratio=0.25, **args))
        if self.dtype is not None:
            model = model.to(self.dtype)
        path = folder / f"weights{self.suffix}"
        se_inject.save(model, folder / "full.safetensors")
        full = load_file(folder / "full.safetensors")
        plain = timm.create_model(name, **args)
        base = {k: full[k] for k in plain.state_dict()}
        if "norms" in self.content:  # which the file has
            base = {k: torch.full_like(t, 3) if k in Parts.of(model).norms else t for k, t in base.items()}
        if "statistics" in self.content:
            base = {k: torch.zeros_like(t) if k.rpartition(".")[2].startswith("running") else t for k, t in base.items()}
        save_file(base, folder / "base.safetensors")
        if self.content == "base":
            plain.load_state_dict(base)
        expected = out(plain if self.content == "base" else model)
        if self.suffix == ".safetensors" and self.content != "base":
            only = {"full": None, "SE": "se", "SE and head": ("se", "head"),
                    "SE and statistics": ("se", "stats"), "SE, norms and head": ("se", "norms", "head")}[self.content]
            se_inject.save(model.to(self.dtype), path, only=only)
            return path, base, expected
        state = base if self.content == "base" else full
        saved = {"": state, "DDP": {"state_dict": {f"module.{k}": t for k, t in state.items()}, "arch": f"se_inject/{name}"},
                 "Lightning": {"pytorch-lightning_version": "2.6.0", "hyper_parameters": {"rate": 0.1},
                               "state_dict": {f"net.model.{k}": t for k, t in state.items()}},
                 "EMA, compile": {"state_dict": {}, "state_dict_ema": {f"_orig_mod.{k}": t for k, t in state.items()}}}
        FORMATS[self.suffix](saved[self.wrap], path)
        return path, base, expected


KINDS = [
    Kind("base", ".safetensors"), Kind("base", ".pth"), Kind("full", ".safetensors"), Kind("full", ".pth"),
    Kind("full", ".pth", wrap="DDP"), Kind("full", ".pth", wrap="EMA, compile"),
    Kind("full", ".ckpt", wrap="Lightning"),
    Kind("full", ".safetensors", torch.bfloat16), Kind("full", ".safetensors", torch.float16),
    Kind("full", ".safetensors", sizes=True), Kind("SE", ".safetensors"), Kind("SE and head", ".safetensors"),
    Kind("SE and statistics", ".safetensors", families=NORMED), Kind("SE, norms and head", ".safetensors"),
]  # fmt: skip


def checkpoint_path(create, path, kind, folder):
    return create(checkpoint_path=str(path))


def overlay(create, path, kind, folder):
    sizes = {"num_classes": 3, "input_size": (1, 64, 64)} if kind.sizes else {}
    return create(pretrained=True, pretrained_cfg_overlay={"file": str(path), "source": "", "custom_load": False, **sizes})


def as_folder(create, path, kind, folder):
    where = folder / "hub"
    timm.models._hub.save_for_hf(create(), where)
    (where / "pytorch_model.bin").unlink()
    shutil.copy(path, where / {".safetensors": "model.safetensors"}.get(path.suffix, "pytorch_model.bin"))
    return where


def local_dir(create, path, kind, folder):
    return timm.create_model(f"local-dir:{as_folder(create, path, kind, folder)}", pretrained=True)


def hf_hub(create, path, kind, folder):
    repo = folder / "cache" / "models--someone--model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    shutil.copytree(as_folder(create, path, kind, folder), repo / "snapshots" / ("0" * 40))
    return timm.create_model("hf-hub:someone/model", pretrained=True, cache_dir=folder / "cache")


def load_state_dict(create, path, kind, folder):
    model = create()
    model.load_state_dict(clean_state_dict(load_file(path) if path.suffix == ".safetensors" else weights(torch.load(path))))
    return model


def weights(loaded):
    return loaded.get("state_dict_ema") or loaded.get("state_dict") or loaded


def load_checkpoint(create, path, kind, folder):
    model = create()
    timm.models.load_checkpoint(model, str(path))
    return model


def resume_checkpoint(create, path, kind, folder):
    model = create()
    timm.models.resume_checkpoint(model, str(path))
    return model


def se_load(create, path, kind, folder):
    base = path.with_name("base.safetensors") if kind.content.startswith("SE") else None
    if path.suffix == ".safetensors" and kind.content != "base":
        return se_inject.load(path, base=base)
    return se_inject.load(path, create())


def command(create, path, kind, folder):
    name, args = create.name, ["-o", folder / "out.safetensors"]
    if kind.content.startswith("SE"):
        call("merge", path, "--base", path.with_name("base.safetensors"), *args)
    elif path.suffix == ".safetensors" and kind.content == "full":
        call("merge", path, *args)
    else:
        given = [f"--model-kwargs={key}={value}" for key, value in create.args.items()]
        call("inject", path, "--model", name, "--ratio", 0.25, *given, *args)
    return se_inject.load(folder / "out.safetensors")


class Create:
    """timm's `create_model` for one family, with blocks; without them (`twin=False`), to see what timm itself does."""

    def __init__(self, name, kind, twin=True):
        self.name, self.twin, self.args = name, twin, {**kind.families[name], **(SIZES if kind.sizes else {})}

    def __call__(self, **kwargs):
        if self.twin:
            return timm.create_model(f"se_inject/{self.name}", se_ratio=0.25, **self.args, **kwargs)
        return timm.create_model(self.name, **self.args, **kwargs)


DOORS = {
    'create_model(checkpoint_path=FILE)': checkpoint_path,
    'create_model(pretrained=True, pretrained_cfg_overlay=dict(file=FILE))': overlay,
    'create_model("local-dir:FOLDER", pretrained=True)': local_dir,
    'create_model("hf-hub:USER/NAME", pretrained=True)': hf_hub,
    'model.load_state_dict(...)': load_state_dict,
    'timm.models.load_checkpoint': load_checkpoint,
    'timm.models.resume_checkpoint': resume_checkpoint,
    'se_inject.load': se_load,
    'se-inject inject, merge': command,
}  # fmt: skip


MARKS = {local_dir: [needs_local_dir], resume_checkpoint: [needs_safetensors_in_torch_load, pytest.mark.contract],
         hf_hub: [pytest.mark.contract]}  # like `load_checkpoint` and `local_dir`


def cell(door, kind, name, folder, written):
    """The result of a door for a kind of file: "yes", or "timm: no" if a plain model with its own weights fails, too."""
    path, base, expected = written(kind, name)
    try:
        model = DOORS[door](Create(name, kind), path, kind, folder)
    except Exception as error:
        plain = Kind("base", kind.suffix, kind.dtype, kind.wrap, kind.sizes)
        (folder / "plain").mkdir()
        with pytest.raises(type(error)):
            DOORS[door](Create(name, kind, twin=False), written(plain, name)[0], plain, folder / "plain")
        return "timm: no"
    if kind.content.startswith("SE") and DOORS[door] not in (se_load, command):
        parts = Parts.of(model)
        own = {"SE": {}, "SE and head": parts.head, "SE and statistics": parts.stats,
               "SE, norms and head": {**parts.norms, **parts.head}}[kind.content]
        model.load_state_dict({**base, **own})  # the blocks keep their weights
    assert torch.equal(out(model), expected), f"{door}: {kind.title} of {name} gives other outputs"
    return "yes"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Files, each written once: one process runs all doors."""
    made = {}

    def write(kind, name):
        if (kind.title, name) not in made:
            made[kind.title, name] = kind.write(tmp_path_factory.mktemp("kind"), name)
        return made[kind.title, name]

    return write


@pytest.mark.xdist_group("doors")
@pytest.mark.parametrize("door", [pytest.param(door, marks=MARKS.get(DOORS[door], ())) for door in DOORS])
def test_a_door_loads_every_kind_of_file(door, written, tmp_path, request, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cells = []
    for i, kind in enumerate(KINDS):
        found = set()
        for name in kind.families:
            folder = tmp_path / f"{i}-{name}"
            folder.mkdir()
            found.add(cell(door, kind, name, folder, written))
        cells.append("; ".join(sorted(found)))
    row = f"| `{door}` | {' | '.join(cells)} |"
    text = PAGE.read_text()
    if request.config.getoption("--overwrite"):
        text = re.sub(rf"(?m)^\| `{re.escape(door)}` \|.*$|^\| {re.escape(door)} \|$", lambda _: row, text)
        PAGE.write_text(text)
    assert row in text.splitlines()


def test_the_table_has_all_kinds():
    assert f"| door | {' | '.join(kind.title for kind in KINDS)} |" in PAGE.read_text().splitlines()
