"""Hooks that a library sets on its own modules belong to its models; those of a user are left out of a recorded run."""

from __future__ import annotations

import copy
import importlib
import sys

import pytest
import torch

import se_inject

LIBRARY = '''
import contextvars
import functools

import torch
from torch import nn

_states = contextvars.ContextVar("states", default=None)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))

    def forward(self, x):
        return x + self.f(x)


def note(module, args, output):
    if _states.get() is not None:
        _states.get().append(output)


class Notes:
    """Keeps what it has seen."""

    def __init__(self):
        self.count, self.seen = 0, []

    def hook(self, name, module, args, output):
        self.count += 1
        self.seen.append(name)


class Model(nn.Module):
    """Reads the outputs of its layers from hooks, which its first call sets."""

    def __init__(self, asks=False):
        super().__init__()
        self.stem, self.layers = nn.Conv2d(3, 8, 1), nn.ModuleList([Layer(), Layer()])
        self.heads = nn.ModuleList([nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)])
        self.register_buffer("scale", torch.tensor(2.0))
        self.asks, self.hooked = asks, False

    def forward(self, x):
        if not self.hooked:
            for layer in self.layers:
                layer.register_forward_hook(note)
            self.hooked = True
        states = []
        token = _states.set(states)
        try:
            y = self.stem(x)
            for layer in self.layers:
                y = layer(y)
        finally:
            _states.reset(token)
        assert len(states) == 2, len(states)
        y = self.heads[0](states[0]) + self.heads[1](states[1])
        return y * float(self.scale) if self.asks else y


def watched(model):
    notes = Notes()
    model.layers[0].register_forward_hook(functools.partial(notes.hook, "first"))
    return notes
'''


@pytest.fixture
def library(tmp_path, monkeypatch):
    folder = tmp_path / "site-packages"
    folder.mkdir()
    (folder / "library_with_hooks.py").write_text(LIBRARY)
    monkeypatch.syspath_prepend(folder)
    yield importlib.import_module("library_with_hooks")
    del sys.modules["library_with_hooks"]


def hooks_of(model):
    return [(m._forward_hooks, dict(m._forward_hooks)) for m in model.modules()]


@pytest.mark.parametrize("asks", [False, True])  # a model that asks for values is run twice
def test_a_model_that_was_called_before_is_planned_like_one_that_was_not(library, asks):
    x = torch.randn(2, 3, 10, 10)
    fresh = library.Model(asks).eval()
    called = copy.deepcopy(fresh)
    base = copy.deepcopy(fresh)
    expected = called(x)
    before = hooks_of(called)
    plans = [str(se_inject.plan(m, input_size=(3, 10, 10))) for m in (fresh, called)]
    assert plans[0] == plans[1] and "layers.1.se" in plans[0]
    assert hooks_of(called) == before and sum(len(hooks) for _, hooks in before) == 2
    assert all(a is b for (a, _), (b, _) in zip(hooks_of(called), before)) and not any(h for _, h in hooks_of(fresh))
    for model in (fresh, called):
        se_inject.inject(model, input_size=(3, 10, 10))
        assert se_inject.block_paths(model) == ["layers.0.se", "layers.1.se"]
        assert torch.equal(model(x), expected) and torch.equal(base(x), expected)
        assert torch.allclose(se_inject.optimize_for_inference(model)(x), expected, atol=1e-5)


def test_what_a_hook_of_the_library_keeps_is_as_it_was(library):
    model = library.Model().eval()
    notes = library.watched(model)
    seen = notes.seen
    se_inject.inject(model, input_size=(3, 10, 10))
    assert notes.count == 0 and notes.seen is seen and seen == []
    model(torch.randn(2, 3, 10, 10))
    assert notes.count == 1 and seen == ["first"]


def test_hooks_of_a_user_do_not_run_and_still_change_values(library):
    seen = []

    def half(module, args, output):
        seen.append(tuple(output.shape))
        return output * 0.5

    model, x = library.Model().eval(), torch.randn(2, 3, 10, 10)
    plain = model(x)
    for m in (model.layers[0], model.layers[1].f):
        m.register_forward_hook(half)
    expected = model(x)
    seen.clear()
    se_inject.inject(model, input_size=(3, 10, 10))
    assert not seen and se_inject.block_paths(model) == ["layers.0.se", "layers.1.se"]
    assert torch.equal(model(x), expected) and not torch.equal(expected, plain) and len(seen) == 2


def test_a_model_of_transformers_that_reads_hidden_states():
    transformers = pytest.importorskip("transformers")
    model = transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[7, 3], strides=[4, 2],
        num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16)).eval()
    fresh, x = copy.deepcopy(model), torch.randn(2, 3, 32, 32)
    expected = model(x).logits
    assert str(se_inject.plan(model, input_size=(3, 32, 32))) == str(se_inject.plan(fresh, input_size=(3, 32, 32)))
    se_inject.inject(model, input_size=(3, 32, 32))
    assert len(se_inject.block_paths(model)) == 4 and torch.equal(model(x).logits, expected)
