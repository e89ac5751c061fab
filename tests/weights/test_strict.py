"""`load_state_dict` of an injected model takes base, full and SE-only weights, and no others."""

from __future__ import annotations

import logging

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

import se_inject

from ..support.checks import randomise
from ..support.outputs import out


def test_load_state_dict_says_what_it_did(files, caplog):
    folder, name, y, yb = files
    model = timm.create_model(f"se_inject/{name}")
    base, se = load_file(folder / "base.safetensors"), load_file(folder / "se.safetensors")
    with caplog.at_level(logging.INFO, "se_inject"):
        caplog.clear()
        model.load_state_dict(base)
        assert torch.equal(out(model), yb)
        model.load_state_dict(se)
        assert torch.equal(out(model), y)
        model.load_state_dict(base)  # the blocks keep their trained weights
        assert torch.equal(out(model), y)
    assert caplog.messages == [
        f"{len(base)} base tensors loaded, {len(se)} SE tensors at identity",
        f"{len(base)} base tensors kept, {len(se)} SE tensors loaded",
        f"{len(base)} base tensors loaded, {len(se)} SE tensors kept"]
    timm.models.load_checkpoint(model, str(folder / "full.safetensors"))
    assert torch.equal(out(model), y)
    wrapped = torch.nn.Sequential(model)
    wrapped.load_state_dict({f"0.{k}": t for k, t in base.items()})
    broken = dict(base)
    broken.pop(next(k for k, t in base.items() if t.dim() == 4))
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(broken)


def test_a_part_of_a_block_is_an_error(files):
    folder, name, _, _ = files
    model = timm.create_model(f"se_inject/{name}")
    state = load_file(folder / "full.safetensors")
    state.pop(next(iter(load_file(folder / "se.safetensors"))))
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(state)


class _Loads(nn.Sequential):
    def _load_from_state_dict(self, *args):
        self.said.append(1)
        super()._load_from_state_dict(*args)


@pytest.mark.parametrize("own", [
    lambda m: m.layer2.register_load_state_dict_post_hook(lambda module, _: module.said.append(1)),
    lambda m: m.layer2.register_load_state_dict_pre_hook(lambda module, *_: module.said.append(1)),
    lambda m: setattr(m.layer2, "__class__", _Loads),
    lambda m: m.register_state_dict_post_hook(
        lambda module, state, *_: module.layer2.said.append(state.update({k: t.clone() for k, t in state.items()})))],
    ids=["post hook", "pre hook", "method", "copies"])
def test_a_module_with_its_own_way_to_load_is_asked(tmp_path, own):
    written = randomise(se_inject.inject(timm.create_model("test_resnet")))
    se_inject.save(written, tmp_path / "m.safetensors")
    model = se_inject.inject(timm.create_model("test_resnet"))
    model.layer2.said = []
    own(model)
    se_inject.load(tmp_path / "m.safetensors", model)
    assert model.layer2.said
    assert all(torch.equal(t, model.state_dict()[k]) for k, t in written.state_dict().items())
