"""Files of weights that several tests read."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import se_inject
from se_inject.weights.reading import read_checkpoint

from ..support.checks import randomise
from ..support.outputs import X
from ..support.tiers import contract

NAMES = [
    *(pytest.param(name, marks=pytest.mark.xdist_group(f"files of {name}"))
      for name in ("test_resnet", "mobilenetv2_035", "test_convnext")),
    *contract("resnet18", "tf_efficientnet_lite0", "convnext_atto")]


@pytest.fixture(scope="module", params=NAMES)
def files(request, tmp_path_factory):
    """The weights of one trained model in every form, with the outputs that they must give."""
    folder, name = tmp_path_factory.mktemp("files"), request.param
    model = randomise(timm.create_model(f"se_inject/{name}")).eval()
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.02)
    y = model(X).detach()
    state = model.state_dict()
    se_inject.save(model, folder / "full.safetensors")
    se_inject.save(model, folder / "se.safetensors", only="se")
    torch.save({"state_dict": {f"module.{k}": t for k, t in state.items()}, "arch": f"se_inject/{name}", "epoch": 3},
               folder / "train.pth.tar")
    torch.save({"state_dict": {}, "state_dict_ema": {f"_orig_mod.{k}": t for k, t in state.items()}}, folder / "ema.pth")
    se_inject.eject(model)
    save_file(model.state_dict(), folder / "base.safetensors")
    yb = model(X).detach()
    assert not torch.equal(y, yb)
    return folder, name, y, yb


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A small trained model, the tensors of its file, and the recipe in the file."""
    model = randomise(timm.create_model("se_inject/test_resnet")).eval()
    path = tmp_path_factory.mktemp("written") / "m.safetensors"
    se_inject.save(model, path)
    return model, load_file(path), json.loads(read_checkpoint(path).metadata["se_inject"])
