"""torchvision: DeepLabV3, and in the same lines LR-ASPP and FCN."""

import json

import torch
from torch.nn.utils import parameters_to_vector
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large

import se_inject


def make():
    return deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None).eval()


def blocks(model):
    return [parameters_to_vector(model.get_submodule(path).parameters()).detach() for path in se_inject.block_paths(model)]


torch.manual_seed(0)
model, images = make(), torch.randn(2, 3, 64, 64)
before = model(images)["out"]
plan = se_inject.plan(model, input_size=(3, 64, 64))
se_inject.inject(model, input_size=(3, 64, 64))
assert torch.equal(model(images)["out"], before)
start = blocks(model)
assert len(start) == len(plan.sites)

model.train()
model(images)["out"].square().mean().backward()
torch.optim.SGD(model.parameters(), lr=0.1).step()
model.eval()
assert not any(map(torch.equal, blocks(model), start))

se_inject.save(model, "segmentation.safetensors")
again = se_inject.load("segmentation.safetensors", model=make())
assert torch.equal(again(images)["out"], model(images)["out"])
print(json.dumps({"identity": True, "blocks": len(start), "training": True, "save and load": True}))
