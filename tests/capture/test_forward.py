"""What the trace of a forward holds, and what it cannot hold."""

from __future__ import annotations

import random

import pytest
import torch

import se_inject

from ..support.checks import check_identity
from ..support.residual import Network, NormEnd, Unit
from ..support.toys import Net
from ..support.units import (
    Toy,
)


def test_a_forward_that_differs_between_modes_is_never_baked():
    class Modes(Toy):
        def forward(self, x):
            y = self.b(self.a(x)) if self.training else self.c(x)
            return x + y

    model = Net(Modes())
    with pytest.raises(se_inject.NoSitesError, match="differs between train and eval mode"):
        se_inject.inject(model, input_size=(3, 8, 8))
    assert type(model.unit) is Modes


class Autocast(Unit):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.b(self.a(x))
        return x + y.float()


class Frozen(Unit):
    def forward(self, x):
        with torch.no_grad():
            y = self.a(x)
        return x + self.b(y)


class Counting(Unit):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return x + self.b(self.a(x))


class Remembering(Unit):
    def forward(self, x):
        self.last = x
        return x + self.b(self.a(x))


class Drawing(Unit):
    def forward(self, x):
        y = self.b(self.a(x))
        return x + y * (2 if random.random() < 0.5 else 1)


class Writing(NormEnd):
    """Not followed by fx: an assignment to a part."""

    def forward(self, x):
        y = self.b(self.a(x))
        y[:, 0] = 0
        return x + y


@pytest.mark.parametrize("unit, reason", [
    (Autocast, "grad or autocast mode"), (Frozen, "grad or autocast mode"), (Counting, "sets attributes or buffers"),
    (Remembering, "sets attributes or buffers"), (Drawing, "draws random numbers"), (Writing, "cannot be traced")])
def test_what_a_trace_cannot_hold_is_skipped_with_the_reason(unit, reason):
    model = Network(Unit(), unit())
    plan = se_inject.plan(model, input_size=(3, 16, 16))
    assert [s.path for s in plan.sites] == ["units.0.se"]
    assert [(s.owner, s.kind) for s in plan.skipped] == [("units.1", "unknown")] and reason in plan.skipped[0].reason
    if unit not in (Counting, Drawing):  # these differ from run to run
        check_identity(model, (3, 16, 16))
    with pytest.raises(se_inject.NoSitesError, match=reason):  # and no convolution inside is gated instead
        se_inject.inject(Network(unit()), input_size=(3, 16, 16))
