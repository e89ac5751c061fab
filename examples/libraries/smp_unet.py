"""segmentation_models_pytorch: a Unet."""

import json

import segmentation_models_pytorch as smp
import torch
from torch.nn.utils import parameters_to_vector

import se_inject


def make():
    return smp.Unet("resnet18", encoder_weights=None).eval()


def blocks(model):
    return [parameters_to_vector(model.get_submodule(path).parameters()).detach() for path in se_inject.block_paths(model)]


torch.manual_seed(0)
model, images = make(), torch.randn(2, 3, 64, 64)
before = model(images)
plan = se_inject.plan(model, input_size=(3, 64, 64))
se_inject.inject(model, input_size=(3, 64, 64))
assert torch.equal(model(images), before)
start = blocks(model)
assert len(start) == len(plan.sites)

model.train()
model(images).square().mean().backward()
torch.optim.SGD(model.parameters(), lr=0.1).step()
model.eval()
assert not any(map(torch.equal, blocks(model), start))

se_inject.save(model, "unet.safetensors")
again = se_inject.load("unet.safetensors", model=make())
assert torch.equal(again(images), model(images))
print(json.dumps({"identity": True, "blocks": len(start), "training": True, "save and load": True}))
