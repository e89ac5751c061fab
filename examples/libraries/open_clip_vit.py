"""open_clip: the image tower of a CLIP model."""

import json

import open_clip
import torch
from torch.nn.utils import parameters_to_vector

import se_inject


def make():
    return open_clip.create_model("ViT-B-32", pretrained=None).visual.eval()


def blocks(model):
    return [parameters_to_vector(model.get_submodule(path).parameters()).detach() for path in se_inject.block_paths(model)]


torch.manual_seed(0)
model, images = make(), torch.randn(2, 3, 224, 224)
before = model(images)
plan = se_inject.plan(model, input_size=(3, 224, 224))
se_inject.inject(model, input_size=(3, 224, 224))
assert torch.equal(model(images), before)
start = blocks(model)
assert len(start) == len(plan.sites)

model.train()
model(images).square().mean().backward()
torch.optim.SGD(model.parameters(), lr=0.1).step()
model.eval()
assert not any(map(torch.equal, blocks(model), start))

se_inject.save(model, "clip_vit.safetensors")
again = se_inject.load("clip_vit.safetensors", model=make())
assert torch.equal(again(images), model(images))
print(json.dumps({"identity": True, "blocks": len(start), "training": True, "save and load": True}))
