"""PEFT: LoRA on the attention of an injected ViT; the blocks are trained and saved with the adapter."""

import json

import timm
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.utils import parameters_to_vector

import se_inject


def blocks(model):
    return [parameters_to_vector(model.get_submodule(path).parameters()).detach() for path in se_inject.block_paths(model)]


torch.manual_seed(0)
model, images = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2).eval(), torch.randn(2, 3, 64, 64)
weights = {k: v.clone() for k, v in model.state_dict().items()}
before = model(images)
plan = se_inject.plan(model)
se_inject.inject(model)
assert torch.equal(model(images), before)
assert len(se_inject.block_paths(model)) == len(plan.sites)

adapted = get_peft_model(model, LoraConfig(target_modules=["qkv"], modules_to_save=se_inject.block_paths(model)))
assert torch.equal(adapted(images), before)
start = [parameters_to_vector(p for p in adapted.parameters() if p.requires_grad).detach()]
adapted.train()
adapted(images).square().mean().backward()
torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1).step()
trained = adapted.eval()(images)
assert not torch.equal(trained, before)

adapted.save_pretrained("adapter")
again = timm.create_model("se_inject/vit_tiny_patch16_224", img_size=64, depth=2)
again.load_state_dict(weights, strict=False)
assert torch.equal(PeftModel.from_pretrained(again, "adapter").eval()(images), trained)
print(json.dumps({"identity": True, "blocks": len(plan.sites), "training": True, "save and load": True}))
