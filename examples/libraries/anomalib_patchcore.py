"""anomalib: PatchCore on the features of a timm model with blocks, by its name."""

import json

import torch
from anomalib.models.image.patchcore.torch_model import PatchcoreModel
from torch.nn.utils import parameters_to_vector

import se_inject


def make(name):
    model = PatchcoreModel(["blocks.2", "blocks.6"], backbone=name, pre_trained=False)
    model.feature_extractor.requires_grad = True
    return model.eval()


def blocks(model):
    return [parameters_to_vector(model.get_submodule(path).parameters()).detach() for path in se_inject.block_paths(model)]


torch.manual_seed(0)
normal, images = torch.randn(4, 3, 64, 64), torch.randn(2, 3, 64, 64)
base, model = make("mobilenetv2_050"), make("se_inject_mobilenetv2_050")
base.train()(normal)
base.subsample_embedding(0.5)
model.load_state_dict(base.eval().state_dict(), strict=False)  # with the memory bank
assert torch.equal(model(images).anomaly_map, base(images).anomaly_map)
net = model.feature_extractor.feature_extractor
start = blocks(net)
assert start

features = model.feature_extractor(images)
sum(f.square().mean() for f in features.values()).backward()
torch.optim.SGD(net.parameters(), lr=0.1).step()
assert not any(map(torch.equal, blocks(net), start))

torch.save(model.state_dict(), "patchcore.pt")
again = make("se_inject_mobilenetv2_050")
again.load_state_dict(torch.load("patchcore.pt"))
assert torch.equal(again(images).anomaly_map, model(images).anomaly_map)
print(json.dumps({"identity": True, "blocks": len(start), "training": True, "save and load": True, "memory bank": True}))
