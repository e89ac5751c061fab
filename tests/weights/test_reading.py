"""What a load costs, counted: files opened, tensors read, memory passed over."""

from __future__ import annotations

from collections import Counter

import pytest
import safetensors.torch
import timm
import torch
from click.testing import CliRunner

import se_inject
from se_inject.cli import main

from ..support.checks import randomise
from ..support.passes import Passes, nbytes


@pytest.fixture
def reads(monkeypatch):
    """How often each file is opened, and each tensor in it read."""
    count = Counter()
    real = safetensors.safe_open

    class Counted:
        def __init__(self, file, **kwargs):
            self.file, self.inner = str(file).rpartition("/")[2], real(file, **kwargs)

        def __enter__(self):
            count[self.file] += 1
            self.inner.__enter__()
            return self

        def __exit__(self, *error):
            return self.inner.__exit__(*error)

        def get_tensor(self, key):
            count[self.file, key] += 1
            return self.inner.get_tensor(key)

        def __getattr__(self, name):
            return getattr(self.inner, name)

    monkeypatch.setattr(safetensors, "safe_open", Counted)
    torch_load = torch.load
    monkeypatch.setattr(torch, "load", lambda file, **k: count.update([str(file).rpartition("/")[2]]) or torch_load(file, **k))
    return count


@pytest.fixture
def folder(tmp_path):
    model = randomise(timm.create_model("se_inject/test_resnet", num_classes=10)).eval()
    se_inject.save(model, tmp_path / "full.safetensors")
    se_inject.save(model, tmp_path / "se.safetensors", only="se")
    se_inject.eject(model)
    torch.save({"state_dict": model.state_dict(), "arch": "test_resnet"}, tmp_path / "base.pth")
    safetensors.torch.save_file(model.state_dict(), tmp_path / "base.safetensors")
    return tmp_path


@pytest.mark.parametrize(("files", "load"), [
    (["full"], lambda d, m: se_inject.load(d / "full.safetensors")),
    (["full"], lambda d, m: se_inject.load(d / "full.safetensors", model=m)),
    (["base"], lambda d, m: se_inject.load(d / "base.safetensors", model=m)),
    (["se", "base"], lambda d, m: se_inject.load(d / "se.safetensors", base=d / "base.safetensors")),
    (["base.pth"], lambda d, m: se_inject.load(d / "base.pth", model=m)),
    (["base.pth"], lambda d, m: se_inject.load(d / "base.pth")),
    (["full"], lambda d, m: command("eject", d / "full.safetensors", "-o", d / "o.safetensors")),
    (["base"], lambda d, m: command("inject", d / "base.safetensors", "--model", "test_resnet", "-o", d / "o.safetensors")),
    (["base.pth"], lambda d, m: command("inject", d / "base.pth", "-o", d / "o.safetensors")),
    (["se", "base"], lambda d, m: command(
        "merge", d / "se.safetensors", "--base", d / "base.safetensors", "-o", d / "o.safetensors")),
    (["full"], lambda d, m: command("info", d / "full.safetensors")),
], ids=["built", "given", "base", "se", "given pth", "built pth", "eject", "inject", "inject pth", "merge", "info"])
def test_each_file_is_opened_once_and_no_tensor_read_twice(folder, reads, files, load):
    model = se_inject.inject(timm.create_model("test_resnet", num_classes=10))
    load(folder, model)
    opened = {name: n for name, n in reads.items() if isinstance(name, str)}
    assert opened == {name if "." in name else f"{name}.safetensors": 1 for name in files}
    assert not reads or max(reads.values()) == 1


def command(*args):
    result = CliRunner().invoke(main, ["-q", *map(str, args)], catch_exceptions=False)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("name", ["full.safetensors", "base.safetensors", "base.pth"])
def test_load_passes_over_the_weights_once(folder, name):
    model = se_inject.inject(timm.create_model("test_resnet", num_classes=10))
    with Passes() as passes:
        se_inject.load(folder / name, model=model)
    assert passes.copied <= nbytes(model)
    assert passes.other < nbytes(model) / 20


def test_blocks_alone_leave_the_base_where_it_is(folder):
    model = se_inject.inject(timm.create_model("test_resnet", num_classes=10))
    blocks = sum(t.numel() * t.element_size() for t in safetensors.torch.load_file(folder / "se.safetensors").values())
    with Passes() as passes:
        se_inject.load(folder / "se.safetensors", model=model)
    assert passes.copied == blocks


def test_a_tensor_that_is_not_asked_for_takes_no_memory(folder):
    from se_inject.weights.reading import read_checkpoint

    torch.save({"state_dict": {"a": torch.ones(3)}, "optimizer": torch.zeros(1 << 20)}, folder / "train.pth")
    with Passes() as passes:
        found = read_checkpoint(folder / "train.pth")
    assert torch.equal(found.tensors["a"], torch.ones(3))
    assert passes.copied + passes.other == 0
