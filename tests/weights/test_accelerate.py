"""Injected models without memory, as accelerate makes them, with weights that it loads."""

from __future__ import annotations

import pytest

pytest.importorskip("accelerate")
import timm
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch, load_checkpoint_in_model
from safetensors.torch import save_file

import se_inject
from se_inject import block_paths
from se_inject.blocks import build

from ..support.checks import randomise
from ..support.versions import needs_loads_on_meta

X = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
pytestmark = [
    pytest.mark.usefixtures("uninitialized_is_nan"),
    pytest.mark.filterwarnings("ignore:.*get_pg_default_device:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*get_pg_default_device:UserWarning")]


def in_model(model, folder):
    load_checkpoint_in_model(model, folder)


def in_model_strictly(model, folder):
    load_checkpoint_in_model(model, folder, strict=True)


def in_model_by_map(model, folder):
    load_checkpoint_in_model(model, folder, device_map={"": "cpu"})


def dispatched(model, folder):
    load_checkpoint_and_dispatch(model, folder, device_map={"": "cpu"})


def dispatched_by_itself(model, folder):
    load_checkpoint_and_dispatch(model, folder, device_map="auto")


@pytest.mark.parametrize("load, buffers", [
    # with buffers on the meta device, these two need a process group
    *(pytest.param(load, False, marks=needs_loads_on_meta) for load in (in_model, in_model_strictly)),
    *((load, buffers) for load in (in_model_by_map, dispatched, dispatched_by_itself) for buffers in (False, True))])
def test_blocks_that_a_file_lacks_are_identities(load, buffers, tmp_path):
    base = randomise(timm.create_model("test_resnet")).eval()
    save_file(base.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    build._identity_problem.cache_clear()  # the trial of a block, which is in memory after the first injection
    with init_empty_weights(include_buffers=buffers):
        model = timm.create_model("se_inject/test_resnet").eval()
    assert all(p.is_meta for p in model.parameters())
    load(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(model(X), base(X))
    assert not any(t.is_meta for t in model.state_dict().values())


def test_blocks_that_a_file_has_are_loaded(tmp_path):
    full = randomise(timm.create_model("se_inject/test_vit", img_size=96)).eval()
    save_file(full.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    with init_empty_weights():
        model = timm.create_model("se_inject/test_vit", img_size=96).eval()
    load_checkpoint_in_model(model, tmp_path, device_map={"": "cpu"})
    with torch.no_grad():
        assert torch.equal(model(X), full(X))


def test_an_injection_into_weights_that_are_there(tmp_path):
    model = randomise(timm.create_model("test_resnet")).eval()
    with torch.no_grad():
        expected = model(X)
    with init_empty_weights():
        se_inject.inject(model)
    with torch.no_grad():
        assert torch.equal(model(X), expected)
    assert len(block_paths(model)) == 4
