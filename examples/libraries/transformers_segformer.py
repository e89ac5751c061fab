"""transformers: SegformerForSemanticSegmentation, which reads hidden states from hooks that its first call sets."""

import json

import torch
from torch.nn.utils import parameters_to_vector
from transformers import SegformerConfig, SegformerForSemanticSegmentation

import se_inject


def make():
    return SegformerForSemanticSegmentation(SegformerConfig(
        hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 3, 4], decoder_hidden_size=32)).eval()


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

model.save_pretrained("segformer")  # which writes older names of the tensors
for path in ("segformer", "segformer/model.safetensors"):
    again = se_inject.load(path, model=make())
    assert torch.equal(again(images).logits, model(images).logits)
print(json.dumps({"identity": True, "blocks": len(start), "training": True, "save and load": True, "save_pretrained": True}))
