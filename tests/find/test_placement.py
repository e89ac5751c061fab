"""Where in a unit a block is, at each placement."""

from __future__ import annotations

import torch

import se_inject

from ..support.toys import Net
from ..support.units import (
    Concat,
    Nested,
    TwoBranches,
)


def test_the_gate_of_a_nested_branch_is_before_its_scale():
    model = se_inject.inject(Net(Nested()), input_size=(3, 8, 8))
    assert [type(m).__name__ for m in model.unit.branch.children()] == ["Sequential", "Conv2d", "SqueezeExcite", "Scale"]


def test_inner_is_where_the_branchs_convolution_is():
    model = se_inject.inject(Net(Nested()), input_size=(3, 8, 8), placement="inner")
    assert [type(m).__name__ for m in model.unit.branch.children()] == ["Sequential", "SqueezeExcite", "Conv2d", "Scale"]
    plan = se_inject.plan(Net(Concat()), input_size=(3, 8, 8), placement="inner")
    assert not plan.sites and "one convolution over space that the whole branch goes through" in plan.skipped[0].reason
    assert len(se_inject.plan("densenet121", placement="inner").sites) == 58  # a new feature ends with its convolution


def test_a_part_of_the_input_is_gated_as_a_shortcut():
    """DPN's shortcuts are views of one map, into which nothing is written."""
    plan = se_inject.plan("dpn68", placement="identity")
    assert len(plan.sites) == 22 and not any("in place" in s.reason for s in plan.skipped)


def test_pre_gates_each_input_once():
    model = se_inject.inject(Net(TwoBranches()), input_size=(3, 8, 8), placement="pre")
    seen = []
    for child in (model.unit.a, model.unit.c):
        child.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model(torch.randn(2, 3, 8, 8))
    assert seen[0] is seen[1]  # both branches read the gated input
