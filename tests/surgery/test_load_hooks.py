"""Models on the meta device get weights from a file that lacks the blocks; memory without values is NaN in these tests."""

from __future__ import annotations

import logging

import pytest
import timm
import torch

import se_inject
from se_inject import block_paths

from ..support.checks import randomise
from ..support.processes import meta_fsdp, pair
from ..support.versions import needs_coordinate_attention, needs_models_on_meta

MODELS = ("test_resnet", "test_vit", "test_convnext", "test_efficientnet_ln")
X = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.usefixtures("uninitialized_is_nan")


def base_of(name, dtype=torch.float32):
    model = randomise(timm.create_model(name)).eval().to(dtype)
    return model, model.state_dict()


def on_meta(name, **options):
    with torch.device("meta"):
        return timm.create_model(f"se_inject/{name}", **options).eval()


def assert_equal(model, base):
    assert not [key for key, t in model.state_dict().items() if t.is_meta]
    with torch.no_grad():
        x = X.to(next(base.parameters()).dtype)
        assert torch.equal(model(x), base(x))
    assert all(p.requires_grad for p in model.parameters())


def assign(model, state):
    model.load_state_dict(state, assign=True)


def empty(model, state):
    model.to_empty(device="cpu").load_state_dict(state)


def empty_and_assign(model, state):
    model.to_empty(device="cpu").load_state_dict(state, assign=True)


def reset(model, state):
    model.to_empty(device="cpu")
    for m in model.modules():
        if hasattr(m, "reset_parameters"):
            m.reset_parameters()
    model.load_state_dict(state)


def one_by_one(model, state):
    """As accelerate does with a map of devices."""
    for key, value in state.items():
        path, _, name = key.rpartition(".")
        module = model.get_submodule(path)
        holder = module._parameters if name in module._parameters else module._buffers
        holder[name] = torch.nn.Parameter(value) if holder is module._parameters else value
    model(X.to(value.dtype))  # the first call


@needs_models_on_meta
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("load", [assign, empty, empty_and_assign, reset, one_by_one])
def test_blocks_that_a_file_lacks_are_identities(name, load):
    base, state = base_of(name)
    model = on_meta(name)
    load(model, state)
    assert_equal(model, base)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_state_dict_with_tensors_on_meta_lacks_them():
    base, state = base_of("test_resnet")
    model = on_meta("test_resnet")
    assign(model, {**model.state_dict(), **state})
    assert_equal(model, base)


@pytest.mark.parametrize("block", ["film", "eca", "cbam", "ge", pytest.param("coord", marks=needs_coordinate_attention)])
def test_so_are_blocks_of_other_kinds(block):
    base, state = base_of("test_resnet")
    model = on_meta("test_resnet", se_block=block)
    assign(model, state)
    assert_equal(model, base)


@needs_models_on_meta
@pytest.mark.parametrize("load", [assign, one_by_one])
def test_blocks_follow_what_is_loaded_to_its_dtype(load):
    base, state = base_of("test_convnext", torch.bfloat16)
    model = on_meta("test_convnext")
    load(model, state)
    assert_equal(model, base)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_in_mixed_precision_they_follow_the_tensors_of_their_dtype():
    base, _ = base_of("test_resnet")
    state = {k: t.bfloat16() if t.dim() == 4 else t for k, t in base.state_dict().items()}
    with torch.device("meta"):
        model = timm.create_model("test_resnet").eval()
        for m in model.modules():
            if isinstance(m, torch.nn.Conv2d):
                m.bfloat16()
    model = se_inject.inject(model)
    before = {p: model.get_submodule(p).fc1.weight.dtype for p in block_paths(model)}
    assign(model, state)
    assert {p: model.get_submodule(p).fc1.weight.dtype for p in block_paths(model)} == before


def test_blocks_with_values_keep_them_and_follow():
    model = randomise(timm.create_model("se_inject/test_resnet")).eval()
    with torch.no_grad():
        expected = {k: t.bfloat16() for k, t in model.state_dict().items() if ".se." in k}
    base = timm.create_model("test_resnet").bfloat16()
    assign(model, base.state_dict())
    assert all(torch.equal(model.state_dict()[k], t) for k, t in expected.items())
    model(X.bfloat16())


def test_blocks_that_are_there_are_loaded():
    full = randomise(timm.create_model("se_inject/test_resnet")).eval()
    model = on_meta("test_resnet")
    assign(model, full.state_dict())
    assert_equal(model, full)
    partly = on_meta("test_resnet")
    assign(partly, {k: t for k, t in full.state_dict().items() if not k.startswith("layer2.0.se.")})
    assert se_inject.blocks.identity.is_identity(partly.layer2[0].se)
    assert torch.equal(partly.layer1[0].se.fc2.weight, full.layer1[0].se.fc2.weight)


def test_a_part_of_a_model_names_what_it_lacks():
    base, _ = base_of("test_resnet")
    model = on_meta("test_resnet")
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.se\.fc1\.weight"):
        model.layer1.load_state_dict(base.layer1.state_dict(), assign=True)


def test_the_log_counts_them_as_identities(caplog):
    _, state = base_of("test_resnet")
    with caplog.at_level(logging.INFO, "se_inject"):
        assign(on_meta("test_resnet"), state)
    assert "92 base tensors loaded, 16 SE tensors at identity" in caplog.text


@pytest.mark.contract
@pytest.mark.xdist_group("processes")
def test_fsdp_starts_from_meta():
    base, state = base_of("test_resnet")
    with torch.no_grad():
        expected = base(X)
    for load in ("empty", "reset", "assign", "broadcast"):
        for rank in pair().run(meta_fsdp, X, state, load):
            assert torch.equal(rank, expected), load
