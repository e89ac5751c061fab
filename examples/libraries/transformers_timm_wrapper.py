"""transformers: a timm model with blocks, by its name, in TimmWrapperForImageClassification; it saves as any other."""

import json

import torch
from torch.nn.utils import parameters_to_vector
from transformers import AutoModelForImageClassification, TimmWrapperConfig, TimmWrapperForImageClassification

import se_inject


def blocks(model):
    return [parameters_to_vector(model.get_submodule(path).parameters()).detach() for path in se_inject.block_paths(model)]


torch.manual_seed(0)
images = torch.randn(2, 3, 64, 64)
args = {"zero_init_last": False}  # else the branches of random weights are zero, and no gradient reaches the blocks
base = TimmWrapperForImageClassification(TimmWrapperConfig(architecture="resnet18", model_args=args, num_labels=5)).eval()
config = TimmWrapperConfig(architecture="se_inject_resnet18", model_args={**args, "se_ratio": 1 / 8}, num_labels=5)
model = TimmWrapperForImageClassification(config).eval()
missing, unexpected = model.load_state_dict(base.state_dict(), strict=False)
assert torch.equal(model(images).logits, base(images).logits)
start = blocks(model.timm_model)
assert len(start) == len(se_inject.plan("resnet18").sites)

model.train()
model(images, labels=torch.tensor([0, 1])).loss.backward()
torch.optim.SGD(model.parameters(), lr=0.1).step()
model.eval()
assert not any(map(torch.equal, blocks(model.timm_model), start))

model.save_pretrained("classifier")
again = AutoModelForImageClassification.from_pretrained("classifier").eval()
assert torch.equal(again(images).logits, model(images).logits)
print(json.dumps({"identity": True, "blocks": len(start), "training": True, "save and load": True, "save_pretrained": True}))
