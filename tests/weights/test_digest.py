"""A file of blocks knows its base: another one is a warning with names, the same one in another precision is none."""

from __future__ import annotations

import json
import pathlib
import re

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import se_inject
from se_inject.errors import WeightsError
from se_inject.weights import digest
from se_inject.weights.reading import read_checkpoint

from ..cli.test_cli import call
from ..support.checks import randomise
from ..support.outputs import out

STATS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.fixture
def warnings(monkeypatch):
    """The warnings in the log."""
    said: list[str] = []
    monkeypatch.setattr(digest._logger, "warning", lambda text, *args: said.append(text % args))
    return said


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A file of base weights."""
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    save_file(randomise(timm.create_model("test_resnet"), seed=3).state_dict(), path)
    return path


def injected(base):
    """An injected model over the base, a file or a state dict, whose blocks differ from identities."""
    net = timm.create_model("test_resnet")
    net.load_state_dict(load_file(base) if isinstance(base, pathlib.Path) else base)
    net = se_inject.inject(net)
    g = torch.Generator().manual_seed(5)
    for p in se_inject.se_parameters(net):
        p.data.add_(torch.randn(p.shape, generator=g) * 0.3)
    return net


def test_statistics_that_moved_in_training(tmp_path, base, warnings):
    model = injected(base).train()
    for name, p in model.named_parameters():
        p.requires_grad_(".se." in name)
    for _ in range(20):
        model(torch.randn(4, 3, 32, 32) * 3 + 1)
    y = out(model)
    se_inject.save(model, tmp_path / "se.safetensors", only="se")
    se_inject.save(model, tmp_path / "stats.safetensors", only=("se", "stats"))
    assert not warnings

    loaded = se_inject.load(tmp_path / "se.safetensors", base=base)
    assert not torch.allclose(out(loaded), y, rtol=0.1)
    (said,) = warnings
    moved = sum(k.endswith(STATS[:2]) for k in load_file(base))
    total = sum(not k.endswith(STATS[2]) for k in load_file(base))
    assert f"{moved} of {total} tensors differ" in said and re.search(r"running_\w+ \((by [\d.]+%|\d+ times)\)", said)
    assert ".weight" not in said and "freeze_base" in said and "only=('se', 'stats')" in said
    warnings.clear()

    assert torch.equal(out(se_inject.load(tmp_path / "stats.safetensors", base=base)), y)
    given = injected(base)
    assert torch.equal(out(se_inject.load(tmp_path / "stats.safetensors", given)), y)
    again = injected(base)
    again.load_state_dict(load_file(tmp_path / "stats.safetensors"))
    assert torch.equal(out(again), y)
    assert not warnings
    assert read_checkpoint(tmp_path / "stats.safetensors").recipe.content == "se+stats"


def test_norms_that_learned(tmp_path, base, warnings):
    """A file with blocks, norms and head has what a training of these changes; the blocks alone are warned of."""
    model = se_inject.freeze_base(injected(base), norms=True).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(torch.randn(4, 3, 32, 32)).square().mean().backward()
    optimizer.step()
    y = out(model)
    for name, only in (("se", "se"), ("all", ("norms", "se", "head"))):
        se_inject.save(model, tmp_path / f"{name}.safetensors", only=only)
    assert read_checkpoint(tmp_path / "all.safetensors").recipe.content == "se+head+norms"
    assert torch.equal(out(se_inject.load(tmp_path / "all.safetensors", base=base)), y) and not warnings
    given = injected(base)
    assert torch.equal(out(se_inject.load(tmp_path / "all.safetensors", given)), y) and not warnings
    assert not torch.equal(out(se_inject.load(tmp_path / "se.safetensors", base=base)), y)
    assert "only=('se', 'norms')" in warnings[0] and "only=('se', 'head')" in warnings[0]


@pytest.mark.parametrize("lacks", ["bn1.weight", "fc.bias"])
def test_a_part_that_lacks_a_tensor_changes_nothing(tmp_path, base, lacks):
    path = tmp_path / "a.safetensors"
    se_inject.save(randomise(injected(base), seed=3), path, only=("se", "norms", "head"))
    found = read_checkpoint(path)
    given = injected(base)
    before = {k: t.clone() for k, t in given.state_dict().items()}
    wrong = {"one is missing": ({k: t for k, t in found.tensors.items() if k != lacks}, "missing"),
             "one has another shape": ({**found.tensors, lacks: found.tensors[lacks][:2].clone()}, "another shape")}
    for tensors, message in wrong.values():
        save_file(tensors, path, found.metadata)
        with pytest.raises(WeightsError, match=message):
            se_inject.load(path, given)
        assert all(torch.equal(t, before[k]) for k, t in given.state_dict().items())


def test_by_every_door_that_compares(tmp_path, base, warnings):
    model = injected(base)
    se_inject.save(model, tmp_path / "se.safetensors", only="se")
    other = load_file(base)
    other["layer2.0.conv2.weight"] *= 1.5
    save_file(other, tmp_path / "other.safetensors")
    plain = timm.create_model("test_resnet")
    plain.load_state_dict(other)
    call("merge", tmp_path / "se.safetensors", "--base", tmp_path / "other.safetensors", "-o", tmp_path / "o.safetensors")
    se_inject.load(tmp_path / "se.safetensors", base=tmp_path / "other.safetensors")
    se_inject.load(tmp_path / "se.safetensors", plain)
    se_inject.load(tmp_path / "se.safetensors", plain)  # which has blocks now
    assert len(warnings) == 4
    for said in warnings:
        assert "1 of " in said and "layer2.0.conv2" in said and "unless another one is what you want" in said
    warnings.clear()
    plain.load_state_dict(load_file(base))
    se_inject.load(tmp_path / "se.safetensors", plain)
    se_inject.load(tmp_path / "se.safetensors", base=base)
    call("merge", tmp_path / "se.safetensors", "--base", base, "-o", tmp_path / "o.safetensors")
    assert not warnings


def test_a_head_that_was_replaced(tmp_path, base, warnings):
    model = injected(base)
    nn.init.normal_(model.fc.weight)
    se_inject.save(model, tmp_path / "se.safetensors", only="se")
    se_inject.save(model, tmp_path / "both.safetensors", only=("se", "head"))
    se_inject.load(tmp_path / "se.safetensors", base=base)
    assert "1 of " in warnings[0] and "fc.weight" in warnings[0] and "only=('se', 'head')" in warnings.pop()
    se_inject.load(tmp_path / "both.safetensors", base=base)
    se_inject.load(tmp_path / "se.safetensors", base=base, head=tmp_path / "both.safetensors")
    assert not warnings
    given = injected(base)
    given.reset_classifier(0)
    se_inject.load(tmp_path / "se.safetensors", given)
    assert "fc.weight (not there), fc.bias (not there)" in warnings.pop()
    given.reset_classifier(4)
    se_inject.load(tmp_path / "se.safetensors", given)
    assert "2 of " in warnings.pop()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_a_copy_in_another_precision_is_the_same_base(tmp_path, base, warnings, dtype, scale):
    state = {k: t * scale if t.is_floating_point() and "running" not in k else t for k, t in load_file(base).items()}
    state["layer1.0.bn1.running_var"].fill_(0.9)
    copy = {k: t.to(dtype) if t.is_floating_point() else t for k, t in state.items()}
    for name, tensors in {"own": state, "copy": copy}.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    model = injected(state)
    se_inject.save(model, tmp_path / "se.safetensors", only="se")
    se_inject.load(tmp_path / "se.safetensors", base=tmp_path / "copy.safetensors")
    se_inject.load(tmp_path / "se.safetensors", injected(state).to(dtype))
    se_inject.save(model.to(dtype), tmp_path / "half.safetensors", only="se")
    for name in ("own", "copy"):
        se_inject.load(tmp_path / "half.safetensors", base=tmp_path / f"{name}.safetensors")
    assert not warnings
    key = next(k for k in copy if k.endswith("running_mean"))
    copy[key] = copy[key] + 0.1
    save_file(copy, tmp_path / "moved.safetensors")
    se_inject.load(tmp_path / "se.safetensors", base=tmp_path / "moved.safetensors")
    assert len(warnings) == 1 and f"1 of {sum(not k.endswith(STATS[2]) for k in copy)}" in warnings[0] and key in warnings[0]


def test_the_digest_says_how_far():
    g = torch.Generator().manual_seed(0)
    tensors = {"large": torch.randn(300, 4096, generator=g)[:, 1:], "small": torch.randn(7, generator=g),
               "int": torch.arange(5), "complex": torch.randn(9, dtype=torch.complex64, generator=g), "empty": torch.zeros(0),
               "nan": torch.full((3,), float("nan")), "scalar": torch.tensor(2.0)}
    said = json.loads(digest.digests(tensors))
    found = {k: (digest._unpacked(p), digest._coarse(getattr(torch, dtype)))
             for dtype, part in said.items() for k, p in part.items()}
    for key, t in tensors.items():
        assert digest._distance(*found[key], t) == 0
        assert digest._distance(*found[key], None) == float("inf")
        if t.numel() and key not in ("nan", "int"):
            for far in (1e-3, 0.1, 10):
                noise = torch.randn(t.shape, dtype=t.dtype, generator=g)
                moved = t + noise * (far * t.abs().norm() / noise.norm())
                assert far / 100 < digest._distance(*found[key], moved) < far * 100
    assert digest._distance(*found["int"], torch.arange(5).flip(0)) > 0.1
    assert digest._distance(*found["nan"], torch.zeros(3)) > 1
    swapped = tensors["large"].flip(0)
    assert digest._distance(*found["large"], swapped) > 0.1


def test_a_bad_header_is_no_error(tmp_path, base, warnings):
    se_inject.save(injected(base), tmp_path / "se.safetensors", only="se")
    with safe_open(tmp_path / "se.safetensors", framework="pt") as f:
        header = f.metadata()
    for bad in ("{", "[]", '{"float32": 3}', '{"float32": {"a": "b"}}', '{"load": {"fc.bias": "AAAAAAAAAAA"}}', "[" * 100_000):
        save_file(load_file(tmp_path / "se.safetensors"), tmp_path / "bad.safetensors", metadata={**header, digest.KEY: bad})
        se_inject.load(tmp_path / "bad.safetensors", base=base)
        assert "cannot be read" in warnings.pop()


def test_modes_of_torch_do_not_change_a_digest():
    tensors = {"a": torch.randn(64, 4096), "b": torch.randn(9)}
    said = [digest._sums(t)[0] for t in tensors.values()]
    digest._stream.cache_clear()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), torch.device("meta"):
            assert [digest._distance(tuple(s), (0.0, 0.0), t) for s, t in zip(said, tensors.values())] == [0, 0]
    finally:
        torch.set_float32_matmul_precision("highest")


def test_signs_are_the_same_for_ever():
    assert digest.digests({"a": torch.arange(1.0, 9001)}) == '{"float32": {"a": "wGWeSMCG0cg"}}'
