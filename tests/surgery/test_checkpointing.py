"""Owners that checkpoint inside their own forward still do, after the rewrite, and recompute the same stretch."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import se_inject

from ..support.checks import randomise
from ..support.toys import conv


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = conv(16, 16), nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.grad_checkpointing = False

    def inner(self, x):
        return self.b(self.a(x))

    def forward(self, x):
        y = checkpoint(self.inner, x, use_reentrant=False) if self.grad_checkpointing else self.inner(x)
        return torch.relu(self.norm(y) + x)


class WhereAsked(Block):
    """As mmdetection writes it."""

    def forward(self, x):
        run = checkpoint if self.grad_checkpointing and x.requires_grad else lambda f, x, use_reentrant: f(x)
        y = run(self.inner, x, use_reentrant=False)
        return torch.relu(self.norm(y) + x)


class InTraining(Block):
    """As transformers writes it."""

    def forward(self, x):
        y = checkpoint(self.inner, x, use_reentrant=False) if self.grad_checkpointing and self.training else self.inner(x)
        return torch.relu(self.norm(y) + x)


class Twice(Block):
    """Two stretches; what the block gates is the end of the second."""

    def forward(self, x):
        if not self.grad_checkpointing:
            return torch.relu(self.norm(self.b(self.a(x))) + x)
        y = checkpoint(self.a, x, use_reentrant=False)
        y = checkpoint(lambda t: self.norm(self.b(t)), y, use_reentrant=False)
        return torch.relu(y + x)


class SavesElsewhere(Block):
    def forward(self, x):
        with torch.autograd.graph.save_on_cpu():
            y = self.inner(x)
        return torch.relu(self.norm(y) + x)


class Net(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.Sequential(block(), block())

    def forward(self, x):
        return self.blocks(self.stem(x)).mean((2, 3))

    def set_grad_checkpointing(self, enable=True):
        for b in self.blocks:
            b.grad_checkpointing = enable


def step(model, x):
    """How often each module is called in a training step; the gradients; the buffers after it."""
    calls = Counter()
    handles = [
        m.register_forward_pre_hook(lambda m, args, name=name: calls.update([name])) for name, m in model.named_modules()]
    model.zero_grad()
    torch.manual_seed(0)
    model(x).square().sum().backward()
    for h in handles:
        h.remove()
    return calls, {k: p.grad for k, p in model.named_parameters() if p.grad is not None}, dict(model.named_buffers())


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("first", [True, False], ids=["set before", "set after"])
@pytest.mark.parametrize("block", [Block, WhereAsked, InTraining, Twice])
def test_the_same_is_recomputed(block, first):
    base = randomise(Net(block))
    ours = copy.deepcopy(base)
    if first:
        ours.set_grad_checkpointing()
    se_inject.inject(ours, input_size=(3, 16, 16))
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    plain = copy.deepcopy(ours)
    plain.set_grad_checkpointing(False)
    _, grads, _ = step(plain, x)
    ours.set_grad_checkpointing()
    base.set_grad_checkpointing()
    calls, mine, mine_buffers = step(ours, x)
    base_calls, _, base_buffers = step(base, x)
    assert same(mine, grads) and same(mine_buffers, base_buffers)
    assert base_calls["blocks.0.a"] == 2
    assert {k: n for k, n in calls.items() if ".se" not in k} == base_calls


def test_the_block_is_recomputed_with_what_it_gates():
    ours = se_inject.inject(Net(Twice), input_size=(3, 16, 16))
    x = torch.randn(2, 3, 16, 16)
    assert step(ours, x)[0]["blocks.1.se"] == 1
    ours.set_grad_checkpointing()
    assert step(ours, x)[0]["blocks.1.se"] == 2
    with torch.no_grad():
        ours.eval()
        expected = ours(x)
        assert torch.equal(copy.deepcopy(ours)(x), expected)
        ours.set_grad_checkpointing(False)
        assert torch.equal(ours(x), expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:FutureWarning")
def test_a_script_does_not_checkpoint():
    """As timm's own modules, which ask `torch.jit.is_scripting()`."""
    ours = se_inject.inject(Net(Twice), input_size=(3, 16, 16)).eval()
    ours.set_grad_checkpointing()
    x = torch.randn(2, 3, 16, 16)
    expected = ours(x)
    assert torch.equal(torch.jit.script(ours)(x), expected)


def test_other_ways_to_save_are_refused():
    with pytest.raises(se_inject.NoSitesError, match="what autograd saves"):
        se_inject.inject(Net(SavesElsewhere), input_size=(3, 16, 16))
