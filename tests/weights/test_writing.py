"""A save writes all or nothing, in one file or in shards."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import se_inject
from se_inject.errors import WeightsError
from se_inject.weights.reading import read_checkpoint
from se_inject.weights.writing import write_safetensors

from ..support.checks import randomise
from ..support.outputs import out
from ..support.processes import fresh


def test_shards(tmp_path):
    model = randomise(timm.create_model("se_inject/test_resnet")).eval()
    path, y = tmp_path / "m.safetensors", out(model)
    se_inject.save(model, path)
    se_inject.save(model, path, max_shard_size="700KB")
    shards = sorted(tmp_path.glob("m-*.safetensors"))
    assert len(shards) >= 3 and not path.exists() and all(p.stat().st_size < 710_000 for p in shards)
    index = json.loads((tmp_path / "m.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {p.name for p in shards} and index["metadata"]["total_size"] > 1_500_000
    assert torch.equal(out(se_inject.load(path)), y)
    assert torch.equal(out(se_inject.load(tmp_path / "m.safetensors.index.json")), y)
    se_inject.save(model, path, max_shard_size="900KB")  # the shards of the first save go
    assert not any(p.exists() for p in shards) and torch.equal(out(se_inject.load(path)), y)
    next(tmp_path.glob("m-*.safetensors")).rename(tmp_path / "away")
    with pytest.raises(WeightsError, match="is not there"):
        se_inject.load(path)
    se_inject.save(model, path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["away", "m.safetensors"]
    for size in ("much", -1, 0, True, float("nan")):
        with pytest.raises(se_inject.SEInjectError, match=f"max_shard_size={size!r}"):
            se_inject.save(model, path, max_shard_size=size)


def test_names_that_would_share_an_index(tmp_path):
    first, second = (randomise(timm.create_model("se_inject/test_resnet"), seed) for seed in (1, 2))
    path = tmp_path / "m.safetensors"
    se_inject.save(first, path, max_shard_size="500KB")
    se_inject.save(second, tmp_path / "m")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(se_inject.SEInjectError, match=r"for shards write n\.safetensors"):
        se_inject.save(second, tmp_path / "n", max_shard_size="500KB")
    with pytest.raises(se_inject.SEInjectError, match=r"is the name of an index: write m\.safetensors"):
        se_inject.save(second, tmp_path / "m.safetensors.index.json")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert torch.equal(out(se_inject.load(path)), out(first.eval()))
    assert torch.equal(out(se_inject.load(tmp_path / "m")), out(second.eval()))


def test_the_index_of_another_program_stays(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"fc.weight": "model-00001-of-00001.safetensors"}}))
    se_inject.save(timm.create_model("se_inject/test_resnet"), tmp_path / "model.safetensors", only="se")
    assert index.exists()


def test_no_tensors_are_no_file(tmp_path):
    with pytest.raises(WeightsError, match="there are no tensors to write"):
        write_safetensors(tmp_path / "m.safetensors", {}, {})
    assert not any(tmp_path.iterdir())


@pytest.mark.xdist_group("processes")
def test_a_killed_save_loses_nothing(tmp_path):
    """A process that saves two models in turn is killed at random moments; the file always holds one of them."""
    code = """
import os, pathlib, random, signal, sys, time, timm, torch, se_inject
from se_inject.weights.reading import read_checkpoint
torch.set_num_threads(1)
path, shard = pathlib.Path(sys.argv[1]), sys.argv[2]
model = timm.create_model("se_inject/test_resnet")
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
    done = fresh(code, tmp_path / "m.safetensors", "500KB")
    assert done.stdout.split() == ["12", "2"], done.stderr


def test_save_of_a_wrapped_model(tmp_path):
    model = timm.create_model("se_inject/test_resnet")
    se_inject.save(nn.DataParallel(model), tmp_path / "a.safetensors")
    assert torch.equal(out(se_inject.load(tmp_path / "a.safetensors")), out(model))
    with pytest.raises(WeightsError, match=r"save\(model.get_submodule\('inner'\), path\)"):
        se_inject.save(nn.ModuleDict({"inner": model}), tmp_path / "b.safetensors")


def test_save_writes_nothing_into_the_callers_metadata(tmp_path):
    metadata = {"note": "mine"}
    se_inject.save(se_inject.inject(timm.create_model("test_resnet")), tmp_path / "a.safetensors", metadata=metadata)
    assert metadata == {"note": "mine"}
    assert read_checkpoint(tmp_path / "a.safetensors").metadata["note"] == "mine"


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    import safetensors.torch

    path = tmp_path / "a.safetensors"
    model = se_inject.inject(timm.create_model("test_resnet"))
    se_inject.save(model, path)
    before = path.read_bytes()

    def half(tensors, file, metadata=None):
        with open(file, "wb") as f:
            f.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with pytest.raises(WeightsError, match=r"cannot write .*disk full.*unchanged"):
        se_inject.save(model, path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    with pytest.raises(WeightsError, match="cannot write"):
        se_inject.save(model, tmp_path / "no" / "a.safetensors")


def test_a_tensor_is_read_from_the_shard_that_the_index_names(tmp_path, written):
    model, _, _ = written
    x = torch.randn(1, 3, 64, 64)
    se_inject.save(model, tmp_path / "m.safetensors", max_shard_size="500KB")
    index = json.loads((tmp_path / "m.safetensors.index.json").read_text())["weight_map"]
    first, last = min(index.values()), max(index.values())
    stale = {k: torch.zeros_like(model.state_dict()[k]) for k, name in index.items() if name == first}
    save_file({**load_file(tmp_path / last), **stale}, tmp_path / last)
    assert torch.equal(se_inject.load(tmp_path / "m.safetensors")(x), model(x))


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
