"""Forwards made by a program: the injected and the optimized model do what the base does, or leave a place out with its reason.

A new kind of statement is one line of `STATEMENTS`.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, seed, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: F401 (the programs call it)

import se_inject
from se_inject.errors import NoSitesError, TraceError

STATEMENTS = {  # {a} and {b} are values of one shape, {v} is a new one
    "layers": [
        "{v} = self.conv({a})", "{v} = self.norm({a})", "{v} = self.f({a})", "{v} = self.act({a})", "{v} = F.relu({a})",
        "{v} = {a}.sigmoid()", "{v} = self.pool({a})", "{v} = self.drop({a})", "{v} = {a} * self.gamma",
    ],
    "sums": [
        "{v} = {a} + {b}", "{v} = {a} - {b}", "{v} = torch.div({a}, 2.0)", "{v} = torch.add({a}, {b}, alpha=0.5)",
        "{v} = 0.5 * {a}", "{v} = torch.stack([{a}, {b}]).sum(0)", "{v} = sum([{a}, {b}])",
    ],
    "views": [
        "{v} = {a}.flatten(2).view({a}.shape)", "{v} = {a}.permute(0, 2, 3, 1).permute(0, 3, 1, 2)", "{v} = {a}[:]",
        "p, q = {a}.chunk(2, 1); {v} = torch.cat([q, p], 1)", "{v} = {a}.detach()", "{v} = {a}.clone()",
        "{v} = {a}.expand_as({b})", "{v} = {a}.flip(2)", "{v} = torch.cat([{a}[:, :4], {b}[:, 4:]], 1)", "{v} = {a}.float()",
        "{v} = {a}",
    ],
    "writes": [
        "{a} += {b}", "{v} = {a}; {v} *= 2.0", "{a}.mul_(0.5)", "{a}[:, :4] = {b}[:, 4:]", "{a}[:, :4].mul_(2.0)",
        "{v} = F.relu({a}, inplace=True)", "{v} = {a}.relu_()", "{v} = {a}.view({a}.shape); {v}.add_(1.0)",
        "with torch.no_grad(): {a}.add_(0.5)",
    ],
    "questions": [
        "{v} = {a} if {a}.shape[2] == 10 else {b}", "{v} = {a} if isinstance({a}, torch.Tensor) else {b}",
        "{v} = {a} if {a}.dim() == 4 else {b}", "{v} = {a} if {a}.is_contiguous() else {b}",
        "{v} = {a} if {a}.dtype is torch.float32 else {b}", "{v} = {a} * {{10: 0.5}}.get({a}.shape[2], 1.0)",
        "{v} = {a} if {a} is {b} else {b} * 0.5", "{v} = {a} / {a}.shape[1]", "{v} = {a} if {a}.sum() > 0 else {b}",
        "{v} = {a} if {a}.requires_grad else {b}", "{v} = {a} if {a}._version == 0 else {b}",
        "{v} = {a} if {a}.numel() > 3000 else {b}", "{v} = {a} * len({a})", "{v} = {a} if {a}.stride()[-1] == 1 else {b}",
        "{v} = {a} if {a}.data_ptr() == {b}.data_ptr() else {b}", "{v} = {a} if type({a}) is torch.Tensor else {b}",
        "{v} = {a} * {{'10': 0.5}}.get(str({a}.shape[2]), 1.0)", "{v} = {a} if hasattr({a}, 'mask') else {b}",
        "{v} = {a} if {a}.grad_fn is None else {b}", "{v} = {a} if {a}.is_leaf else {b}",
        "{v} = {a} if {a}._is_view() else {b}",
    ],
    "modes": [
        "{v} = {a} if torch.is_grad_enabled() else {b}", "{v} = {a} if self.training else {b}",
        "{v} = {a} if self.conv.training else {b}", "{v} = {a} if torch.is_inference_mode_enabled() else {b}",
        "{v} = {a} if torch.is_autocast_enabled('cpu') else {b}",
        "{v} = {a} if torch.get_default_dtype() is torch.float32 else {b}",
    ],
    "effects": [
        "self.count += 1", "LOG.append({a}.shape[0])", "self.seen.append(len(self.seen))", "self.last = {a}",
        "self.number.add_(1)", "{v} = {a} * random.random()", "{v} = {a} + torch.rand_like({a})",
        "{v} = F.dropout({a}, 0.5, self.training)", "LOG.append(float({a}.sum()))", "{v} = {a} * self.number",
        "torch.manual_seed(1)", "self.conv.scale = 2.0", "{v} = {a} * getattr(self.conv, 'scale', 1.0)",
    ],
}  # fmt: skip
KINDS = ["layers"] * 6 + ["sums"] * 3 + ["views"] * 3 + ["writes"] * 2 + ["questions", "modes", "effects"]
LOG: list[Any] = []


@st.composite
def programs(draw: Callable[..., Any]) -> str:
    names = ["x"]
    lines = []
    for _ in range(draw(st.integers(2, 7))):
        text = draw(st.sampled_from(STATEMENTS[draw(st.sampled_from(KINDS))]))
        # mostly the newest value, so that few statements are without effect
        a, b = names[-1] if draw(st.booleans()) else draw(st.sampled_from(names)), draw(st.sampled_from(names))
        v = f"v{len(names)}"
        lines.append(text.format(a=a, b=b, v=v))
        if "{v}" in text:
            names.append(v)
    lines.append(draw(st.sampled_from([
        f"return x + {names[-1]}", f"return x + self.f({names[-1]})", f"x += {names[-1]}; return x", f"return {names[-1]}"])))
    return "\n".join(f"    {line}" for line in lines)


class Unit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.GELU()
        self.f = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1))
        self.pool, self.drop = nn.AvgPool2d(3, 1, 1), nn.Dropout(0.1)
        self.gamma = nn.Parameter(torch.rand(8, 1, 1))
        self.register_buffer("number", torch.ones(()))
        self.count, self.seen, self.last = 0, [], None


def net(program: str) -> nn.Module:
    """A stem, the unit with this forward, and a residual block that always gets its site."""
    names = dict(globals())
    exec(f"def forward(self, x):\n{program}", names)
    torch.manual_seed(0)
    unit = type("Unit", (Unit,), {"forward": names["forward"]})()
    plain = type("Plain", (Unit,), {"forward": lambda self, x: x + self.f(x)})()
    model = nn.Sequential(nn.Conv2d(3, 8, 1), unit, plain)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.uniform_(-0.1, 0.1)
            m.running_var.uniform_(0.5, 2.0)
    return model.eval()


def seeded() -> None:
    LOG.clear()
    for draw in (random.seed, torch.manual_seed):
        draw(0)


def state(model: nn.Module) -> tuple[Any, ...]:
    """What two forwards leave behind: attributes, weights, the log, and the next random numbers."""
    unit = model[1]
    return (unit.count, list(unit.seen), unit.last, getattr(unit.conv, "scale", None), list(LOG), random.random(),
            torch.rand(1), {k: v.clone() for k, v in model.state_dict().items() if ".se" not in k})


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def behavior(model: nn.Module, training: bool, grad: bool, size: int) -> tuple[Any, ...]:
    """Outputs of two forwards, gradients and traces of one model; or the kind of its error."""
    m, x = copy.deepcopy(model).train(training), torch.linspace(-1, 1, 2 * 3 * size * size).view(2, 3, size, size)
    x.requires_grad_(grad)
    seeded()
    try:
        with torch.set_grad_enabled(grad):
            y = [m(x), m(x)]
            if grad:
                sum((t * t).sum() for t in y).backward()
    except RuntimeError as error:  # the author's own fault, such as a write into what autograd saved
        return ("error", type(error))
    gradients = {k: p.grad for k, p in m.named_parameters() if p.grad is not None and ".se" not in k}
    return ("done", [t.detach() for t in y], x.grad, gradients, state(m))


MODES = [(False, False, 10), (False, True, 10), (True, True, 10), (False, False, 8)]


def check(program: str) -> str:
    """Raises where an injected or optimized model differs from its base; else whether the unit got blocks."""
    base = net(program)
    expected = {mode: behavior(base, *mode) for mode in MODES}
    if expected[MODES[0]][0] == "error":
        return "wrong program"
    model = copy.deepcopy(base)
    seeded()
    try:
        se_inject.inject(model, input_size=(3, 10, 10))  # the last block has its site in any case
    except (TraceError, NoSitesError) as error:  # the run ended in the unit, which comes first
        assert "cannot be called on meta tensors" in str(error)
        for mode, wanted in expected.items():
            assert same(behavior(model, *mode), wanted), f"refused, {mode}"
        return "refused"
    if se_inject.block_paths(model) == ["2.se"]:
        assert all(site.reason for site in se_inject.plan(base, input_size=(3, 10, 10)).skipped)
        kind = "left out"
    else:
        kind = "injected"
    for mode, wanted in expected.items():
        if wanted[0] == "done":
            assert same(behavior(model, *mode), wanted), f"injected, (training, grad, size) = {mode}"
    for block in se_inject.block_paths(model):
        nn.init.normal_(model.get_submodule(block).fc2.weight)
    slow = behavior(model, *MODES[0])
    fast = behavior(se_inject.optimize_for_inference(model, input_size=(3, 10, 10)), *MODES[0])
    for a, b in zip(fast[1], slow[1]):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max())), "optimized"
    assert fast[-1][:2] == slow[-1][:2] and same(fast[-1][5:7], slow[-1][5:7]) and len(fast[-1][4]) == len(slow[-1][4])
    se_inject.eject(model)
    for mode, wanted in expected.items():
        assert same(behavior(model, *mode), wanted), f"ejected, {mode}"
    assert type(model[1]) is type(base[1])
    return kind


def run(examples: int, number: int) -> dict[str, int]:
    counts: dict[str, int] = {}

    @seed(number)
    @settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink])
    @given(programs())
    def one(program: str) -> None:
        note(program)
        kind = check(program)
        counts[kind] = counts.get(kind, 0) + 1

    one()
    return counts


def test_20_programs():
    counts = run(20, 2)
    assert counts["injected"] > 1 and counts["left out"] > 1, counts


@pytest.mark.contract
def test_100_programs():
    counts = run(100, 1)
    assert counts["injected"] > 10 and counts["left out"] > 10, counts


if __name__ == "__main__":  # python -m tests.surgery.test_programs EXAMPLES SEED
    print(run(*map(int, sys.argv[1:3])))
