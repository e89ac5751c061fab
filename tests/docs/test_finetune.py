"""The example that trains: it survives a kill, and what it stores is enough to rebuild the network."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import se_inject

from ..support.processes import imported, script, started

pytestmark = pytest.mark.xdist_group("processes")  # they share two runs
EXAMPLE = Path(__file__).parents[2] / "examples" / "finetune.py"
SMALL = [
    "--data", "digits", "--img-size", "32", "--train", "64", "--val", "32", "--test", "64", "--batch-size", "16",
    "--steps", "8", "--lrs", "0.003", "--seeds", "1", "--checkpoint-every", "2", "--device", "cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def finetune():
    with imported(EXAMPLE) as module:
        yield module


@pytest.fixture(scope="module")
def whole(finetune, tmp_path_factory):
    """Two runs that nothing interrupts, with SE: everything trained, and the base frozen."""
    work = tmp_path_factory.mktemp("whole")
    finetune.main([*SMALL, "--methods", "full-se", "se", "--work", str(work)])
    return work


def folder(work, method):
    (found,) = work.glob(f"*/{method}-lr0.003-seed1")
    return found


@pytest.mark.contract
def test_a_killed_run_ends_with_the_same_weights(finetune, whole, tmp_path):
    command = [*SMALL, "--methods", "full-se", "--work", str(tmp_path)]
    process = started(script(EXAMPLE, tmp_path), *command)
    while process.is_alive() and not list(tmp_path.glob("*/*/checkpoint.pt")):
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (checkpoint,) = tmp_path.glob("*/*/checkpoint.pt")
    assert 0 < torch.load(checkpoint, weights_only=True)["step"] < 8
    finetune.main(command)
    killed, unkilled = (load_file(folder(work, "full-se") / "tuned.safetensors") for work in (tmp_path, whole))
    assert list(killed) == list(unkilled)
    assert all(torch.equal(killed[key], unkilled[key]) for key in killed)
    assert not list(tmp_path.glob("*/*/checkpoint.pt*"))


def test_what_a_run_stores_goes_over_the_base_again(finetune, whole):
    model = finetune.pretrained("lite0")
    model.reset_classifier(10)
    model = se_inject.load(folder(whole, "se") / "tuned.safetensors", model=model)
    args = finetune.parse(SMALL)
    finetune.init_distributed_device(args)
    config = finetune.resolve_model_data_config(model, args={"img_size": args.img_size, "crop_pct": 1.0})
    test = finetune.Pictures(*finetune.load_splits(args, 64)[2], finetune.create_transform(**config))
    results = finetune.Results(whole / "results.csv", finetune.SETTINGS)
    (row,) = (row for row in results.rows.values() if row["method"] == "se")
    top1, loss = finetune.evaluate(model.to(memory_format=torch.channels_last), test, args)
    assert (row["top1"], row["loss"]) == (round(top1, 4), round(loss, 6))
    assert row["bytes"] == (folder(whole, "se") / "tuned.safetensors").stat().st_size


def test_the_methods_of_a_seed_start_with_the_same_outputs(finetune):
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        first, *others = (finetune.build(method, seed=1).eval()(x) for method in finetune.METHODS.values())
    assert all(torch.equal(first, other) for other in others)


def test_only_what_a_method_trains_moves(finetune):
    for method in finetune.METHODS.values():
        model = finetune.build(method, seed=1)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model.train(method.base == "trained")
        model(torch.randn(8, 3, 32, 32)).logsumexp(1).sum().backward()
        optimizer.step()
        moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
        ours = {key for key in before if key.startswith("classifier.") or ".se." in key or "lora_" in key}
        norms = {key for key in before if ".bn" in key or key.startswith("bn") if key.endswith(("weight", "bias"))}
        learned = {"frozen": ours, "lora": ours, "norms": ours | norms}
        assert moved
        assert moved <= learned[method.base] if method.base in learned else moved - ours - norms
        assert any(".se." in key for key in moved) == bool(method.block)
        assert any(key in norms for key in moved) == (method.base in ("norms", "trained"))


def test_the_processes_share_the_batches_of_one(finetune):
    data = finetune.Pictures(torch.arange(70).tolist(), torch.arange(70).tolist(), None, seed=1)
    data.__class__ = type("Indices", (finetune.Pictures,), {"__getitem__": lambda self, i: (i, self.epoch)})

    def drawn(world_size, start=0):
        steps = {}
        for rank in range(world_size):
            args = finetune.parse(SMALL)
            args.rank, args.world_size = rank, world_size
            for step, indices, epochs in finetune.batches(data, args, 8, start):
                steps.setdefault(step, set()).update(zip(epochs.tolist(), indices.tolist()))
        return steps

    one = drawn(1)
    assert [len(batch) for batch in one.values()] == [16] * 8
    assert one[0] != one[4]
    assert drawn(2) == one
    assert drawn(1, start=2) == {step: one[step] for step in range(2, 8)}


@pytest.mark.contract
def test_two_processes_write_what_one_writes(whole, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(EXAMPLE), *SMALL,
         "--methods", "se", "--steps", "2", "--work", str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| SE, head |") == 1
    assert {path.name for path in folder(tmp_path, "se").iterdir()} == {path.name for path in folder(whole, "se").iterdir()}


def test_more_images_than_there_are_is_said(finetune, tmp_path):
    with pytest.raises(SystemExit, match=r"2000 of the 1733 images left of digits; leave 10 over"):
        finetune.main([*SMALL, "--val", "2000", "--work", str(tmp_path)])


def test_a_page_keeps_what_stands_around_the_table(finetune, whole, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- tuning: begin -->\nformer\n<!-- tuning: end -->\nafter\n")
    command = [*SMALL, "--methods", "full-se", "se", "--work", str(whole), "--out", str(page)]
    finetune.main([*command, "--plot", str(tmp_path / "plot.svg")])
    assert "</svg>" in (tmp_path / "plot.svg").read_text()
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "former" not in text
    assert all(finetune.METHODS[method].name in text for method in ("full-se", "se"))
    page.write_text("no place for a table")
    with pytest.raises(SystemExit, match="add these two lines"):
        finetune.main(command)
    assert page.read_text() == "no place for a table"
