"""Every example runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..support.processes import fresh, script

ARGS = {
    "finetune.py": [
        "--data", "digits", "--train", "32", "--val", "16", "--test", "16", "--batch-size", "16", "--img-size", "32",
        "--steps", "2",
        "--lrs", "0.001", "0.01", "--seeds", "1", "2", "--methods", "head", "se"],
    "gpu_cost.py": [
        "--networks", "test_resnet", "--device", "cpu", "--batches", "1", "--training-batch", "2", "--dtype", "float32",
        "--min-time", "0", "--parts", "eager", "training"],
    "profile_cost.py": ["test_resnet", "--rows", "3", "--threads", "1"],
}  # fmt: skip
SHARED = {"study.py", "from_scratch.py"}  # what others import, and what test_from_scratch.py runs
EXAMPLES = sorted(p for p in (Path(__file__).parents[2] / "examples").glob("*.py") if p.name not in SHARED)


@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("path", [
    pytest.param(p, id=p.name, marks=pytest.mark.contract if p.name in ARGS else ()) for p in EXAMPLES])
def test_example(path, tmp_path):
    done = fresh(script(path, tmp_path), *ARGS.get(path.name, []))
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.contract
@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("engine, kind", [("onnxruntime", "FusedGemm"), ("openvino", "FullyConnected")])
def test_engines_are_profiled(engine, kind, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip(engine)
    profile = next(p for p in EXAMPLES if p.name == "profile_cost.py")
    done = fresh(script(profile, tmp_path), "test_resnet", "--engine", engine, "--threads", "1")
    assert done.returncode == 0, done.stderr
    assert f"| {kind}" in done.stdout


def test_there_are_examples():
    assert EXAMPLES
