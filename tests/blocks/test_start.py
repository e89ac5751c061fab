"""Each kind of block gets its start back, from torch's, timm's and FSDP's functions that give layers values."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

import se_inject
from se_inject import block_paths
from se_inject.blocks import catalogue
from se_inject.blocks.build import BlockSpec, make_block, problem
from se_inject.blocks.identity import is_identity
from se_inject.config import SEConfig

KINDS = [*(k for k in catalogue.block_names() if problem(SEConfig(block=k)) is None), "efficientnet", "own"]
LAYOUTS = dict.fromkeys(("se", "film", "eca"), ("NCHW", "NHWC", "NLC"))


class Own(nn.Module):
    """A block with a parameter of no layer, a buffer, and no arguments for device and dtype."""

    def __init__(self, channels):
        super().__init__()
        self.fc = nn.Linear(channels, channels)
        self.offset = nn.Parameter(torch.full((channels,), 3.0))
        self.register_buffer("ones", torch.ones(channels), persistent=False)
        self.gate = nn.Sigmoid()

    def forward(self, x):
        return x * self.gate(self.fc(x.mean((2, 3)) + self.offset) * self.ones)[..., None, None]


@pytest.fixture
def own():
    se_inject.register_block("own", Own, zero=("fc",), gates=("gate",))
    yield
    del catalogue._rows["own"]


def made(kind, layout="NCHW", init="identity", device="cpu"):
    name = "se" if kind == "efficientnet" else kind
    block = make_block(BlockSpec(16, 8, layout, kind), SEConfig(block=name, init=init), None, 1.0, device, torch.float32)
    return block.eval()


def images(layout):
    return torch.randn({"NCHW": (2, 16, 8, 8), "NHWC": (2, 8, 8, 16), "NLC": (2, 64, 16)}[layout])


def reset_all(block):
    for m in block.modules():
        if hasattr(m, "reset_parameters"):
            m.reset_parameters()


def reset_and_apply(block):
    block.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)


def reset_by_layer(block):
    """As FSDP does: each module that has tensors of its own."""
    for m in block.modules():
        if m._parameters or m._buffers:
            m.to_empty(device="cpu", recurse=False)
            m.reset_parameters()


@pytest.mark.parametrize("kind, layout", [(k, layout) for k in KINDS for layout in LAYOUTS.get(k, ("NCHW",))])
@pytest.mark.parametrize("reset", [nn.Module.to_empty, reset_all, reset_and_apply, reset_by_layer])
def test_a_block_gets_its_identity_back(kind, layout, reset, own, uninitialized_is_nan):
    x = images(layout)
    for device in ("meta",) if reset is nn.Module.to_empty else ("meta", "cpu"):
        block = made(kind, layout, device=device)
        block.to_empty(device="cpu")
        with torch.no_grad():
            for p in block.parameters() if reset is not nn.Module.to_empty else ():
                p.normal_()
        if reset is not nn.Module.to_empty:
            assert not torch.equal(block(x), x)
            reset(block)
        assert torch.equal(block(x), x) and is_identity(block)
        assert all(torch.isfinite(t).all() for t in block.state_dict().values())


@pytest.mark.parametrize("kind", KINDS)
def test_with_timms_start_the_values_are_drawn_as_the_class_draws_them(kind, own):
    block = made(kind, init="timm", device="meta").to_empty(device="cpu")
    torch.manual_seed(3)
    block.reset_parameters()
    torch.manual_seed(3)
    expected = made(kind, init="timm")
    for (name, t), value in zip(block.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(t, value), name


def test_copies_and_pickles_reset_themselves_alone():
    block = made("se")
    for copied in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        with torch.no_grad():
            for p in (*block.parameters(), *copied.parameters()):
                p.fill_(1.0)
        copied.reset_parameters()
        assert is_identity(copied) and not is_identity(block)
        copied.fc2.weight.data.fill_(1.0)
        copied.fc2.reset_parameters()
        assert is_identity(copied) and not is_identity(block)


def test_a_block_on_meta_goes_to_a_device_and_casts_there():
    block = made("se", device="meta")
    assert all(p.is_meta and p.dtype is torch.bfloat16 for p in block.bfloat16().parameters())
    assert is_identity(block.to("cpu")) and block.fc2.weight.dtype is torch.bfloat16


def test_values_that_a_block_has_stay_where_others_are_on_meta():
    block, x = made("se", device="meta"), images("NCHW")
    block.fc1.weight = nn.Parameter(torch.full((8, 16, 1, 1), 7.0))
    assert torch.equal(block(x), x) and not block._forward_pre_hooks
    assert block.fc1.weight.eq(7.0).all()


def test_models_of_one_kind_of_block_share_their_traces():
    """What knows the start of a block is not part of what a trace depends on."""
    from se_inject.capture.fingerprint import Fingerprints

    model = timm.create_model("se_inject/test_vit")
    first, second, *_ = (model.get_submodule(p) for p in block_paths(model))
    prints = Fingerprints(model)
    assert prints.of(first) == prints.of(second)
