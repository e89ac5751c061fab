"""Parameter counts against the paper (arXiv 1709.01507): formulas, and its tables within rounding."""

import pytest
import timm

import se_inject

BLOCKS, WIDTHS = (3, 4, 6, 3), (256, 512, 1024, 2048)
EXACT = {"bias": False, "rd_divisor": 1}


def extra(r: int, stages: tuple[int, ...] = (1, 2, 3, 4)) -> int:
    """Section 4: (2/r) * sum over stages of N * C^2."""
    return 2 * sum(BLOCKS[s - 1] * WIDTHS[s - 1] ** 2 for s in stages) // r


def total_millions(plan: se_inject.Plan) -> float:
    """The paper counts the statistics of batch norm with the parameters."""
    model = timm.create_model("resnet50")
    statistics = sum(t.numel() for n, t in model.named_buffers() if n.endswith(("running_mean", "running_var")))
    return (plan.params + statistics + plan.added_params) / 1e6


def test_ratio_16_adds_what_the_formula_says():
    assert extra(16) == 2_514_944
    model = timm.create_model("resnet50")
    before = sum(p.numel() for p in model.parameters())
    se_inject.inject(model, ratio=1 / 16, **EXACT)
    assert sum(p.numel() for p in model.parameters()) - before == extra(16)


# Table 10: parameters in millions. It rounds 35.67 M, the count for r = 4, to 35.7.
@pytest.mark.parametrize("r, millions", [(2, 45.7), (4, 35.7), (8, 30.7), (16, 28.1), (32, 26.9)])
def test_ratios(r, millions):
    plan = se_inject.plan("resnet50", ratio=1 / r, **EXACT)
    assert plan.added_params == extra(r)
    assert total_millions(plan) == pytest.approx(millions, abs=0.06)


# Table 15 counts the stages of the residual blocks from 2.
@pytest.mark.parametrize("stage, millions", [(1, 25.6), (2, 25.7), (3, 26.4)])
def test_single_stages(stage, millions):
    plan = se_inject.plan("resnet50", ratio=1 / 16, stages=stage, **EXACT)
    assert len(plan.sites) == BLOCKS[stage - 1]
    assert plan.added_params == extra(16, (stage,))
    assert total_millions(plan) == pytest.approx(millions, abs=0.06)


def test_inner_is_the_papers_se_3x3():
    plan = se_inject.plan("resnet50", placement="inner", ratio=1 / 16, **EXACT)
    assert plan.added_params == 2 * sum(n * (c // 4) ** 2 for n, c in zip(BLOCKS, WIDTHS)) // 16
    assert total_millions(plan) == pytest.approx(25.8, abs=0.06)
    assert all(site.channels == WIDTHS[site.stage - 1] // 4 for site in plan.sites)


@pytest.mark.parametrize("placement, channels", [
    ("standard", WIDTHS), ("post", WIDTHS), ("identity", WIDTHS), ("pre", (64, 256, 512, 1024))])
def test_where_table_14_puts_it(placement, channels):
    plan = se_inject.plan("resnet50", placement=placement)
    assert len(plan.sites) == sum(BLOCKS)
    firsts = [next(s for s in plan.sites if s.owner == f"layer{i}.0") for i in (1, 2, 3, 4)]
    assert [s.channels for s in firsts] == list(channels)


def test_multiply_adds():
    """Section 4: 3.86 to 3.87 GFLOPs for a squeeze and two layers; the scale is counted with them."""
    plan = se_inject.plan("resnet50", ratio=1 / 16, **EXACT)
    layers = extra(16)
    scale = sum(n * c * side * side for n, c, side in zip(BLOCKS, WIDTHS, (56, 28, 14, 7)))
    assert plan.added_macs == layers + scale
