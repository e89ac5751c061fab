"""transformers: DetrForObjectDetection, the backbone included."""

import json

import torch
from torch.nn.utils import parameters_to_vector
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

import se_inject


def make():
    backbone = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], layer_type="basic", out_features=["stage2"])
    return DetrForObjectDetection(DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, num_queries=10,
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=64, decoder_ffn_dim=64)).eval()


def blocks(model):
    return [parameters_to_vector(model.get_submodule(path).parameters()).detach() for path in se_inject.block_paths(model)]


torch.manual_seed(0)
model, inputs = make(), {"pixel_values": torch.randn(2, 3, 64, 64)}
before = model(**inputs)
plan = se_inject.plan(model, example_inputs=inputs)
se_inject.inject(model, example_inputs=inputs)
after = model(**inputs)
assert torch.equal(after.logits, before.logits) and torch.equal(after.pred_boxes, before.pred_boxes)
start = blocks(model)
assert len(start) == len(plan.sites)

outputs = model.train()(**inputs)
(outputs.logits.square().mean() + outputs.pred_boxes.square().mean()).backward()
torch.optim.SGD(model.parameters(), lr=0.1).step()
model.eval()
assert not any(map(torch.equal, blocks(model), start))

se_inject.save(model, "detr.safetensors")
again = se_inject.load("detr.safetensors", model=make())
assert torch.equal(again(**inputs).pred_boxes, model(**inputs).pred_boxes)
print(json.dumps({"identity": True, "blocks": len(start), "training": True, "save and load": True}))
