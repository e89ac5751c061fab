"""transformers: SwinForImageClassification."""

import json

import torch
from torch.nn.utils import parameters_to_vector
from transformers import SwinConfig, SwinForImageClassification

import se_inject


def make():
    return SwinForImageClassification(SwinConfig(
        image_size=64, embed_dim=32, depths=[2, 2], num_heads=[2, 4], window_size=4)).eval()


def blocks(model):
    return [parameters_to_vector(model.get_submodule(path).parameters()).detach() for path in se_inject.block_paths(model)]


torch.manual_seed(0)
model, images = make(), torch.randn(2, 3, 64, 64)
before = model(images).logits
plan = se_inject.plan(model, input_size=(3, 64, 64))
se_inject.inject(model, input_size=(3, 64, 64))
assert torch.equal(model(images).logits, before)
start = blocks(model)
assert len(start) == len(plan.sites)

model.train()
model(images).logits.square().mean().backward()
torch.optim.SGD(model.parameters(), lr=0.1).step()
model.eval()
assert not any(map(torch.equal, blocks(model), start))

se_inject.save(model, "swin.safetensors")
again = se_inject.load("swin.safetensors", model=make())
assert torch.equal(again(images).logits, model(images).logits)
print(json.dumps({"identity": True, "blocks": len(start), "training": True, "save and load": True}))
