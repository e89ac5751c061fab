"""An owner that checkpoints a part of itself is left out; timm's own checkpointing of whole blocks works as before."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import se_inject
from se_inject import block_paths
from se_inject.errors import TraceError

from ..support.checks import check_identity, randomise
from ..support.toys import conv

SIZE = (3, 16, 16)
REASON = "checkpoints a part of itself.* turn its gradient checkpointing off"


class Block(nn.Module):
    """Checkpoints in both modes."""

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
    """As mmdetection writes it: where the input needs a gradient."""

    def forward(self, x):
        run = checkpoint if self.grad_checkpointing and x.requires_grad else lambda f, x, use_reentrant: f(x)
        y = run(self.inner, x, use_reentrant=False)
        return torch.relu(self.norm(y) + x)


class InTraining(Block):
    """As transformers writes it: in train mode alone."""

    def forward(self, x):
        y = checkpoint(self.inner, x, use_reentrant=False) if self.grad_checkpointing and self.training else self.inner(x)
        return torch.relu(self.norm(y) + x)


class Twice(Block):
    """Two parts, each checkpointed; a block would gate the end of the second."""

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
    def __init__(self, *blocks):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 16, 3, padding=1), nn.Sequential(*blocks)

    def forward(self, x):
        return self.blocks(self.stem(x)).mean((2, 3))


OWNERS = [Block, InTraining, Twice]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("owner", OWNERS)
def test_an_owner_that_checkpoints_is_skipped_with_the_reason(owner, training):
    model = Net(owner(), owner()).train(training)
    model.blocks[1].grad_checkpointing = True
    plan = se_inject.plan(model, input_size=SIZE)
    assert [s.path for s in plan.sites] == ["blocks.0.se"]
    (skipped,) = plan.skipped
    assert skipped.owner == "blocks.1"
    assert "it checkpoints a part of itself" in skipped.reason
    assert "turn its gradient checkpointing off" in skipped.reason
    x = torch.randn(2, *SIZE)
    before = copy.deepcopy(model)(x)
    se_inject.inject(model, input_size=SIZE)
    assert type(model.blocks[1]) is owner and torch.equal(model(x), before)


@pytest.mark.parametrize("owner", OWNERS)
def test_a_model_whose_owners_all_checkpoint_is_as_it_was(owner):
    model = Net(owner())
    model.blocks[0].grad_checkpointing = True
    with pytest.raises(se_inject.NoSitesError, match=REASON):
        se_inject.inject(model, input_size=SIZE)
    assert type(model.blocks[0]) is owner and not block_paths(model)


@pytest.mark.parametrize("owner", [*OWNERS, WhereAsked])
def test_an_owner_whose_checkpointing_is_off_gets_its_block(owner):
    check_identity(Net(owner(), owner()), SIZE)


@pytest.mark.parametrize("owner", [*OWNERS, WhereAsked])
def test_checkpointing_that_is_switched_on_later_is_an_error_until_it_is_off_again(owner):
    model = randomise(se_inject.inject(Net(owner(), owner()), input_size=SIZE))
    x = torch.randn(2, *SIZE)
    for training in (False, True):
        model.train(training)
        expected = copy.deepcopy(model)(x)
        model.blocks[1].grad_checkpointing = True
        for _ in range(2):
            with pytest.raises(TraceError, match=f"the blocks in a {owner.__name__} .*{REASON}"):
                copy.deepcopy(model)(x)
            with pytest.raises(TraceError, match=REASON):
                model(x)
        model.blocks[1].grad_checkpointing = False
        if not training:  # a failed call in train mode has counted in the statistics of the first block
            assert torch.equal(model(x), expected)
        assert block_paths(model) == ["blocks.0.se", "blocks.1.se"]
    calls = []
    model.blocks[1].se.register_forward_hook(lambda *_: calls.append(1))
    model(x).sum().backward()
    assert calls == [1] and model.blocks[1].se.fc2.weight.grad is not None


def test_a_branch_that_checkpoints_is_an_error_and_the_other_works():
    model = Net(WhereAsked())
    model.blocks[0].grad_checkpointing = True
    x = torch.randn(2, *SIZE)
    with torch.no_grad():
        expected = model.eval()(x)
        assert torch.equal(se_inject.inject(model, input_size=SIZE)(x), expected)
    with pytest.raises(se_inject.SEInjectError, match=REASON):
        model(x)


def test_other_changes_to_what_autograd_saves_are_refused():
    with pytest.raises(se_inject.NoSitesError, match="what autograd saves"):
        se_inject.inject(Net(SavesElsewhere()), input_size=SIZE)
