"""transformers: the Trainer trains an injected ViT and keeps checkpoints of it."""

import json

import torch
from torch.nn.utils import parameters_to_vector
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import se_inject


def make():
    return ViTForImageClassification(ViTConfig(
        image_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)).eval()


def blocks(model):
    return [parameters_to_vector(model.get_submodule(path).parameters()).detach() for path in se_inject.block_paths(model)]


torch.manual_seed(0)
model, images = make(), torch.randn(8, 3, 64, 64)
before = model(images).logits
plan = se_inject.plan(model, input_size=(3, 64, 64))
se_inject.inject(model, input_size=(3, 64, 64))
assert torch.equal(model(images).logits, before)
start = blocks(model)
assert len(start) == len(plan.sites)

data = [{"pixel_values": image, "labels": i % 2} for i, image in enumerate(images)]
args = TrainingArguments("checkpoints", max_steps=2, per_device_train_batch_size=4, save_steps=2, report_to=[], use_cpu=True)
Trainer(model, args, train_dataset=data).train()
model.eval()
assert not any(map(torch.equal, blocks(model), start))
se_inject.save(model, "vit.safetensors")
assert torch.equal(se_inject.load("vit.safetensors", model=make())(images).logits, model(images).logits)

# not by resume_from_checkpoint: with transformers 5.24 it leaves a plain ViT untrained, too, and warns of missing keys
again = se_inject.load("checkpoints/checkpoint-2", model=make())
assert torch.equal(again(images).logits, model(images).logits)
print(json.dumps({"identity": True, "blocks": len(start), "training": True, "save and load": True, "checkpoints": True}))
