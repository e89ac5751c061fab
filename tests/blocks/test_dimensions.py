"""Blocks in networks for signals (N, C, L) and volumes (N, C, D, H, W)."""

from __future__ import annotations

import copy

import pytest
import torch

import se_inject

from ..support.checks import randomise
from ..support.dimensions import Plain, residual


@pytest.mark.parametrize("n, layout", [(1, "NCL"), (3, "NCDHW")])
@pytest.mark.parametrize("make", [Plain, residual])
@pytest.mark.parametrize("block", ["se", "film", "eca", "gc"])
def test_signals_and_volumes(n, layout, make, block, tmp_path):
    base, x = randomise(make(n)).eval(), torch.randn(2, 2, *[12] * n)
    size = tuple(x.shape[1:])
    made = se_inject.plan(base, input_size=size, block=block)
    assert {s.layout for s in made.sites} == {layout} and len(made.sites) == 2 and not made.skipped
    model = se_inject.inject(copy.deepcopy(base), input_size=size, block=block)
    with torch.no_grad():
        assert torch.equal(model(x), base(x))
    model.train()(x).square().sum().backward()
    assert any(p.grad.abs().sum() > 0 for p in se_inject.se_parameters(model))
    model = randomise(model).eval()
    with torch.no_grad():
        expected = model(x)
        assert torch.allclose(se_inject.optimize_for_inference(model)(x), expected, atol=1e-5)
        se_inject.save(model, tmp_path / "model.safetensors")
        assert torch.equal(se_inject.load(tmp_path / "model.safetensors", model=make(n)).eval()(x), expected)
    if block == "se":
        assert made.sites[0].macs > 8 * 10 ** n and len(se_inject.fold(model, [x]).folded) == 2


def test_a_block_that_needs_rows_and_columns_is_refused_for_volumes():
    made = se_inject.plan(Plain(3), input_size=(2, 12, 12, 12), block="cbam")
    assert not made.sites and {s.reason.partition(", and")[0] for s in made.skipped} == {
        "block='cbam' needs a map with height and width"}
