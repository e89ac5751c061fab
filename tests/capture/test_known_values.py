"""Models that read values of tensors: those that are known are there, and where they are not, the calls before count."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn

import se_inject
from se_inject.capture.inputs import record_model
from se_inject.capture.snapshot import on_meta
from se_inject.capture.values import equal
from se_inject.errors import TraceError

from ..support.checks import randomise
from ..support.dimensions import Unit


def test_what_does_not_depend_on_the_inputs_is_known():
    seen = []

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.register_buffer("stride", torch.tensor([8.0, 16.0]))
            self.anchor = torch.tensor([3, 4])

        def forward(self, x):
            y = self.conv(x)
            assert torch.full((int(self.stride[0]), 1), self.stride[1], device=x.device).shape == (8, 1)
            assert torch.tensor([2, 3], device=x.device).tolist() == [2, 3] and (self.anchor * 2).tolist() == [6, 8]
            assert y.new_tensor([1, 2]).sum().item() == torch.as_tensor([3.0], device=x.device).item() == 3
            assert torch.tensor(x.shape[-2:]).min().item() == x.shape[-1] and torch.arange(3).cpu().numpy().sum() == 3
            a = torch.zeros(4)
            a[1] = 3
            b = a[1:]
            b += 1
            assert a.tolist() == [0, 4, 1, 1] and a[a > 1].tolist() == [4] and torch.nonzero(a).shape == (3, 1)
            self.stride[0] = 99
            assert self.stride.tolist() == [99, 16]
            a[2:] = y[0, 0, 0, :2]  # and now they depend on them
            for unknown in (a, b):
                with pytest.raises(RuntimeError, match="meta"):
                    unknown.sum().item()
            seen.append(x.device.type)
            return y

    model = Head()
    with on_meta(model):
        run = record_model(model)
    assert run.error is None and set(seen) == {"meta"} and model.stride.tolist() == [8, 16]


class Detector(nn.Module):
    """A network, and boxes that depend on its values."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), Unit(), Unit())
        self.head = Head()
        self.mask = Unit()

    def forward(self, x):
        return self.mask(self.head(self.body(x)))


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.unit = Unit()

    def forward(self, x):
        y = self.unit(x)
        return y[y.mean((1, 2, 3)) > -1e9]


def test_the_calls_before_an_unknown_value_count():
    base = randomise(Detector()).eval()
    made = se_inject.plan(base)
    assert [s.path for s in made.sites] == ["body.1.se", "body.2.se", "head.unit.se"] and not made.skipped
    assert made.ended.startswith("the run without values ended in head (") and made.ended in str(made) == str(made)
    assert made.to_dict()["ended"] == made.ended
    model = se_inject.inject(copy.deepcopy(base), verify=True)
    x = torch.randn(2, 3, 20, 20)
    with torch.no_grad():
        assert torch.equal(model(x), base(x))
    model(x).sum().backward()
    assert all(p.grad is not None for p in se_inject.se_parameters(model))
    with pytest.raises(TraceError, match=r"ended in head .* such as its module 'body'"):
        se_inject.optimize_for_inference(model)
    assert list(se_inject.eject(model).state_dict()) == list(base.state_dict())


def test_an_error_that_is_not_about_values_is_the_models():
    class Wrong(Detector):
        def forward(self, x):
            return self.body(x) @ x

    with pytest.raises(TraceError, match=r"Wrong failed on an input of shape .* RuntimeError"):
        se_inject.plan(Wrong())


def test_a_call_that_raised_and_was_caught_is_not_its_parents_answer():
    class Caught(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.wrong, self.unit = nn.Conv2d(3, 8, 3), nn.Conv2d(5, 8, 3), Unit()

        def forward(self, x):
            x = self.stem(x)
            with contextlib.suppress(RuntimeError):
                x = self.wrong(x)
            return self.unit(x)

    base = randomise(Caught()).eval()
    model = se_inject.inject(copy.deepcopy(base))
    x = torch.randn(2, 3, 20, 20)
    with torch.no_grad():
        assert se_inject.block_paths(model) == ["unit.se"] and equal(model(x), base(x))
