"""Attributes of an owner that are set after the injection."""

from __future__ import annotations

import copy
import io

import pytest
import timm
import torch
from torch import nn

import se_inject
from se_inject.surgery.state import edited_owners

from ..support.checks import randomise
from ..support.residual import Network, Unit
from ..support.tiers import contract

SMALL = {"depths": (2, 1), "num_heads": (1, 2), "embed_dim": 32, "img_size": 64, "window_size": 4}


@pytest.mark.parametrize("name, args, sizes", [
    ("swin_tiny_patch4_window7_224", SMALL, [
        ({"img_size": 128, "window_size": 4}, 128), ({"img_size": 96, "window_size": 3}, 96)]),
    ("swinv2_cr_tiny_ns_224", SMALL, [({"img_size": (96, 96)}, 96)]),
    ("vit_tiny_patch16_224", {"depth": 2, "img_size": 64}, [({"img_size": 96}, 96)]),
    *contract(("swin_tiny_patch4_window7_224", {}, [
        ({"img_size": 448, "window_size": 7}, 448), ({"img_size": 256, "window_size": 8}, 256)])),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore::UserWarning:timm")
def test_attributes_that_are_set_later_are_seen(name, args, sizes):
    """A trace holds what an attribute was; one that is set makes it be traced again."""
    base = randomise(timm.create_model(name, **args)).eval()
    model = se_inject.inject(copy.deepcopy(base))
    classes = [type(m) for m in base.modules()]
    for kwargs, side in sizes:
        x = torch.randn(1, 3, side, side)
        for m in (base, model):
            m.set_input_size(**kwargs)
        stale = copy.deepcopy(model)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        with torch.no_grad():
            expected = base(x)
            for m in (model, stale, torch.load(buffer, weights_only=False)):
                assert torch.equal(m(x), expected)
    se_inject.eject(model)
    assert [type(m) for m in model.modules()] == classes


class Flagged(Unit):
    def __init__(self):
        super().__init__()
        self.skip = True
        self.alone = None

    def forward(self, x):
        y = self.b(self.a(x))
        if self.alone is not None:
            return self.alone(x)
        return x + y if self.skip else y


def test_a_flag_that_is_set_later():
    model = se_inject.inject(Network(Flagged()).eval(), input_size=(3, 16, 16))
    base = Network(Flagged()).eval()
    base.load_state_dict({k: t for k, t in model.state_dict().items() if ".se." not in k})
    x = torch.randn(1, 3, 16, 16)
    for m in (model, base):
        m.units[0].skip = False
    with torch.no_grad():
        assert torch.equal(model(x), base(x))
    calls = []
    model.units[0].se.register_forward_hook(lambda *a: calls.append(1))
    model(x)
    assert calls == [1]
    model.units[0].alone = nn.Identity()  # the branch goes nowhere now, and the block with it
    base.units[0].alone = nn.Identity()
    with torch.no_grad():
        assert torch.equal(model(x), base(x))


def test_an_attribute_of_every_owner_is_set():
    base = randomise(timm.create_model("tiny_vit_5m_224", depths=(1, 1, 1, 1))).eval()
    model = se_inject.inject(copy.deepcopy(base))
    x = torch.randn(1, 3, 64, 64)
    for owner in edited_owners(model):
        owner.note = "anything"
    se_inject.plan(model)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(x), base(x))
        assert torch.equal(model(x), base(x))
    script = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(script(x), base(x))


class Own(Unit):
    def __setattr__(self, name, value):
        if name == "width":
            value = 2 * value
        super().__setattr__(name, value)


def test_the_authors_own_setattr_is_called():
    model = se_inject.inject(Network(Own()), input_size=(3, 16, 16))
    model.units[0].width = 3
    assert model.units[0].width == 6
