"""torchao: int8 weights for an injected ViT, the blocks included; inject first, then quantize."""

import json

import timm
import torch
from torch.nn.utils import parameters_to_vector
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import se_inject


def blocks(model):
    return [parameters_to_vector(model.get_submodule(path).parameters()).detach() for path in se_inject.block_paths(model)]


torch.manual_seed(0)
model, images = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2).eval(), torch.randn(2, 3, 64, 64)
before = model(images)
plan = se_inject.plan(model)
se_inject.inject(model)
assert torch.equal(model(images), before)
start = blocks(model)
assert len(start) == len(plan.sites)

model.train()
model(images).square().mean().backward()
torch.optim.SGD(model.parameters(), lr=1.0).step()
assert not any(map(torch.equal, blocks(model), start))
se_inject.save(model.eval(), "model.safetensors")
again = se_inject.load("model.safetensors")
assert torch.equal(again(images), model(images))

with torch.no_grad():
    exact = again(images)
    quantize_(again, Int8WeightOnlyConfig())
    assert (again(images) - exact).abs().max() < 0.05 * exact.abs().max()
print(json.dumps({"identity": True, "blocks": len(start), "training": True, "save and load": True, "quantized": True}))
