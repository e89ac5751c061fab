"""open_clip: a whole CLIP model, which takes images and texts."""

import json

import open_clip
import torch
from torch.nn.utils import parameters_to_vector

import se_inject


def make():
    vision = {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16}
    text = {"context_length": 16, "vocab_size": 1000, "width": 64, "heads": 2, "layers": 2}
    return open_clip.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text).eval()


def blocks(model):
    return [parameters_to_vector(model.get_submodule(path).parameters()).detach() for path in se_inject.block_paths(model)]


torch.manual_seed(0)
model, inputs = make(), (torch.randn(2, 3, 64, 64), torch.randint(1, 1000, (2, 16)))
before = model(*inputs)
plan = se_inject.plan(model, example_inputs=inputs)
se_inject.inject(model, example_inputs=inputs)
assert all(map(torch.equal, model(*inputs), before))
start = blocks(model)
assert len(start) == len(plan.sites)

images, texts, scale = model.train()(*inputs)
torch.nn.functional.cross_entropy(scale * images @ texts.T, torch.arange(2)).backward()
torch.optim.SGD(model.parameters(), lr=0.1).step()
assert not any(map(torch.equal, blocks(model), start))

se_inject.save(model.eval(), "clip.safetensors")
again = se_inject.load("clip.safetensors", model=make())
assert all(map(torch.equal, again(*inputs), model(*inputs)))
print(json.dumps({"identity": True, "blocks": len(start), "training": True, "save and load": True}))
