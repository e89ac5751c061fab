"""segmentation_models_pytorch: a Unet whose encoder is a timm model with blocks, by its name."""

import json

import segmentation_models_pytorch as smp
import torch
from torch.nn.utils import parameters_to_vector

import se_inject


def blocks(model):
    return [parameters_to_vector(model.get_submodule(path).parameters()).detach() for path in se_inject.block_paths(model)]


torch.manual_seed(0)
images = torch.randn(2, 3, 64, 64)
base = smp.Unet("tu-mobilenetv2_050", encoder_weights=None).eval()
model = smp.Unet("tu-se_inject_mobilenetv2_050", encoder_weights=None).eval()
model.load_state_dict(base.state_dict(), strict=False)
assert torch.equal(model(images), base(images))
start = blocks(model)
assert start

model.train()
model(images).square().mean().backward()
torch.optim.SGD(model.parameters(), lr=0.1).step()
model.eval()
assert not any(map(torch.equal, blocks(model), start))

model.save_pretrained("unet")
again = smp.from_pretrained("unet").eval()
assert torch.equal(again(images), model(images))
print(json.dumps({"identity": True, "blocks": len(start), "training": True, "save and load": True, "save_pretrained": True}))
