"""`save_pretrained` of models that are no transformers' own; those are in tests/weights/test_transformers.py."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import timm
import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

import se_inject

from ..support.checks import randomise
from ..support.outputs import out


class Config:
    """As transformers' configs: all attributes are written."""

    model_type = "net"

    def to_json_string(self):
        return json.dumps(vars(self))


class Net(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.net = config, timm.create_model("test_resnet", num_classes=3)

    def forward(self, x):
        return self.net(x)

    def save_pretrained(self, folder, fails=False):
        (folder / "config.json").write_text(json.dumps({**json.loads(self.config.to_json_string()), "model_type": "net"}))
        if fails:
            raise OSError("the disk is full")
        torch.save(self.state_dict(), folder / "pytorch_model.bin")
        return "written"


def test_the_config_has_the_recipe_while_it_is_written(tmp_path):
    config = Config()
    config.se_inject = "mine"
    model = randomise(se_inject.inject(Net(config), ratio=0.5, filter_fn=lambda site: site.stage != 1)).eval()
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(se_inject.inject(Net(config))))):
        assert each.save_pretrained.args[0] is each
    with pytest.raises(OSError, match="disk"):
        model.save_pretrained(tmp_path, fails=True)
    assert vars(config) == {"se_inject": "mine"}
    assert model.save_pretrained(tmp_path) == "written" and vars(config) == {"se_inject": "mine"}
    assert torch.equal(out(se_inject.load(tmp_path, Net(config)).eval()), out(model))
    assert "save_pretrained" not in vars(se_inject.eject(model))


class Mixed(nn.Module, PyTorchModelHubMixin):
    def __init__(self):
        super().__init__()
        self.net = timm.create_model("test_resnet", num_classes=3)

    def forward(self, x):
        return self.net(x)


def test_a_model_without_such_a_config_says_what_to_write_instead(tmp_path, caplog):
    se_inject.inject(Mixed()).save_pretrained(tmp_path)
    assert "se_inject.save(model, path)" in caplog.text and (tmp_path / "model.safetensors").is_file()
