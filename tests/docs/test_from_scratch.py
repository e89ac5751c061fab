"""The study from scratch: it trains what it says, goes on where it was killed, and tells the differences."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import se_inject

from ..support.processes import imported

EXAMPLE = Path(__file__).parents[2] / "examples" / "from_scratch.py"


@pytest.fixture(scope="module")
def study():
    with imported(EXAMPLE) as module:
        yield module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """scikit-learn's digits as the four files of MNIST, two of them below a folder."""
    folder = tmp_path_factory.mktemp("data")
    pixels, labels = load_digits(return_X_y=True)
    images = [np.asarray(Image.fromarray((p.reshape(8, 8) * 15.9).astype(np.uint8)).resize((28, 28))) for p in pixels]
    for name, part in (("train", slice(0, 640)), ("sub/t10k", slice(640, 900))):
        (folder / name).parent.mkdir(exist_ok=True)
        chosen = np.stack(images[part])
        (folder / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, *chosen.shape) + chosen.tobytes())
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2i", 2049, len(chosen)) + labels[part].astype(np.uint8).tobytes())
    return folder


def test_the_files_of_mnist_are_read(study, folder):
    (train, labels), (test, more) = study.pictures(folder)
    _, digits = load_digits(return_X_y=True)
    assert train.shape == (640, 28, 28) and test.shape == (260, 28, 28)
    assert (labels == digits[:640]).all() and (more == digits[640:900]).all()


@pytest.mark.parametrize("network", ["resnet", "mobilenetv2", "convnext"])
def test_the_variants_of_a_seed_start_as_the_base(study, network):
    x = torch.randn(2, 1, 28, 28)
    models = {variant: study.build(network, 8, 1, variant, 3).eval() for variant in study.VARIANTS}
    outputs = {variant: model(x) for variant, model in models.items()}
    for variant, output in outputs.items():
        # a new ResNet's branches end with a norm that is zero
        assert torch.equal(output, outputs["base"]) == (network == "resnet" or "timm's start" not in variant)
        assert bool(se_inject.block_paths(models[variant])) == (variant != "base")


def test_batches_depend_on_the_seed_and_the_step(study, folder):
    args = study.parse(["--data", str(folder), "--test", "100"])

    def batches(seed, size, steps):
        return list(study.batches(args, {"images": 640, "seed": seed, "batch_size": size, "steps": steps}))

    one, other = (batches(seed, 64, 12) for seed in (1, 2))
    again = batches(1, 64, 11)
    assert len(one) == 12 and all(torch.equal(a, b) for (a, _), (b, _) in zip(one, again))
    assert not torch.equal(one[0][0], other[0][0]) and not torch.equal(one[0][0], one[10][0])
    assert len(batches(1, 96, 20)) == 20  # an epoch leaves a part of a batch out


@pytest.mark.contract
def test_a_small_study(study, folder, tmp_path, capsys):
    page, results = tmp_path / "page.md", tmp_path / "results.csv"
    page.write_text("before\n<!-- from scratch: begin -->\n<!-- from scratch: end -->\n")
    command = ["--data", str(folder), "--networks", "resnet", "--variants", "base", "SE 1/4", "FiLM 1/4", "--width", "8",
               "--images", "640", "--test", "260", "--epochs", "2.4", "--batch-size", "64", "--seeds", "1", "2",
               "--results", str(results), "--out", str(page), "--plot", str(tmp_path / "curves.svg")]  # fmt: skip
    study.main([*command, "--equal-time"])
    first, text = results.read_text(), page.read_text()
    assert text.startswith("before\n") and "| FiLM 1/4 |" in text and "minus base at equal time" in text
    assert "</svg>" in (tmp_path / "curves.svg").read_text()
    found = study.Results(results, study.SETTINGS).rows.values()
    base, film = ([row["error"] for row in found if (row["variant"], row["steps"]) == (v, 24)] for v in ("base", "FiLM 1/4"))
    assert study.difference(film, base) in text
    assert all(len(row["curve"].split()) == study.POINTS and float(row["curve"].split()[-1]) == row["error"] for row in found)
    lines = first.splitlines()
    results.write_text("\n".join(lines[:5]) + "\n" + lines[5][:20])  # as after a kill
    study.main(command)
    kept = [line.split(",") for line in results.read_text().splitlines()]
    seconds = lines[0].split(",").index("seconds")
    assert len(kept) == 7
    assert {tuple(row[:seconds] + row[seconds + 1 :]) for row in kept} <= {
        tuple(row[:seconds] + row[seconds + 1 :]) for row in (line.split(",") for line in lines)}


def test_runs_that_end_well_are_kept_where_another_fails(study, tmp_path):
    results = study.Results(tmp_path / "r.csv", ("n",))
    with pytest.raises(ValueError, match="invalid literal"):
        study.run_jobs(results, [{"n": n} for n in ("1", "x", "2")], _number, 2, False)
    assert sorted(study.Results(tmp_path / "r.csv", ("n",)).rows) == [("1",), ("2",)]
    with pytest.raises(SystemExit, match="has no column other"):
        study.Results(tmp_path / "r.csv", ("n", "other"))


def _number(setting, advance):
    return {"value": int(setting["n"])}


def test_paired_differences(study):
    text = study.difference([3.0, 4.0, 5.0], [1.0, 2.0, 4.0])
    assert text == "**+1.67 ± 1.43**" and study.difference([1.0, 2.0], [1.5, 1.0]) == "+0.25 ± 9.53"


def test_a_folder_without_the_files_is_refused(study, tmp_path):
    (tmp_path / "class").mkdir()
    Image.new("L", (28, 28)).save(tmp_path / "class" / "one.png")
    with pytest.raises(SystemExit, match="the files of Fashion-MNIST are not there"):
        study.load(tmp_path, 10, 10)
