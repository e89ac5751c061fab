"""torchao: int8 weights for an injected ViT, the blocks included; inject first, then quantize."""

import json

import timm
import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import se_inject

torch.manual_seed(0)
model, images = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2).eval(), torch.randn(2, 3, 64, 64)
before = model(images)
plan = se_inject.plan(model)
se_inject.inject(model)
assert torch.equal(model(images), before)
assert len(se_inject.block_paths(model)) == len(plan.sites)
for p in se_inject.se_parameters(model):
    torch.nn.init.normal_(p, std=0.1)

with torch.no_grad():
    exact = model(images)
    quantize_(model, Int8WeightOnlyConfig())
    assert (model(images) - exact).abs().max() < 0.05 * exact.abs().max()
print(json.dumps({"identity": True, "blocks": len(plan.sites), "quantized": True}))
