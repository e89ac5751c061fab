"""transformers: a timm model with blocks, by its name, as a TimmBackbone; it saves as any other."""

import json

import torch
from safetensors.torch import load_model
from torch.nn.utils import parameters_to_vector
from transformers import TimmBackbone, TimmBackboneConfig

import se_inject


def make(name):
    return TimmBackbone(TimmBackboneConfig(backbone=name, use_pretrained_backbone=False)).eval()


def blocks(model):
    return [parameters_to_vector(model.get_submodule(path).parameters()).detach() for path in se_inject.block_paths(model)]


torch.manual_seed(0)
images = torch.randn(2, 3, 64, 64)
base, model = make("mobilenetv2_050"), make("se_inject_mobilenetv2_050")
model.load_state_dict(base.state_dict(), strict=False)
assert torch.equal(model(images).feature_maps[-1], base(images).feature_maps[-1])
start = blocks(model)
assert start

model.train()
model(images).feature_maps[-1].square().mean().backward()
torch.optim.SGD(model.parameters(), lr=0.1).step()
model.eval()
assert not any(map(torch.equal, blocks(model), start))

model.save_pretrained("backbone")  # TimmBackbone.from_pretrained takes names of timm alone
again = make("se_inject_mobilenetv2_050")
load_model(again, "backbone/model.safetensors")
assert torch.equal(again(images).feature_maps[-1], model(images).feature_maps[-1])
print(json.dumps({"identity": True, "blocks": len(start), "training": True, "save and load": True, "save_pretrained": True}))
