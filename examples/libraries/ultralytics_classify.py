"""ultralytics: a YOLO classifier."""

import json

import torch
from torch.nn.utils import parameters_to_vector
from ultralytics.nn.tasks import ClassificationModel

import se_inject


def make():
    return ClassificationModel("yolo11n-cls.yaml").eval()


def blocks(model):
    return [parameters_to_vector(model.get_submodule(path).parameters()).detach() for path in se_inject.block_paths(model)]


torch.manual_seed(0)
model, images = make(), torch.randn(2, 3, 64, 64)
before = model(images)[0]
plan = se_inject.plan(model, input_size=(3, 64, 64))
se_inject.inject(model, input_size=(3, 64, 64))
assert torch.equal(model(images)[0], before)
start = blocks(model)
assert len(start) == len(plan.sites)

model.train()
model(images).square().mean().backward()
torch.optim.SGD(model.parameters(), lr=0.1).step()
model.eval()
assert not any(map(torch.equal, blocks(model), start))

se_inject.save(model, "classify.safetensors")
again = se_inject.load("classify.safetensors", model=make())
assert torch.equal(again(images)[0], model(images)[0])
print(json.dumps({"identity": True, "blocks": len(start), "training": True, "save and load": True}))
