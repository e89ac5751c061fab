"""fastai: a Learner trains an injected model, saves it and loads it."""

import json

import timm
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import SGD
from torch.nn.utils import parameters_to_vector

import se_inject


def blocks(model):
    return [parameters_to_vector(model.get_submodule(path).parameters()).detach() for path in se_inject.block_paths(model)]


torch.manual_seed(0)
model, images = timm.create_model("resnet18", num_classes=2, zero_init_last=False).eval(), torch.randn(8, 3, 64, 64)
before = model(images)
plan = se_inject.plan(model)
se_inject.inject(model)
assert torch.equal(model(images), before)
start = blocks(model)
assert len(start) == len(plan.sites)

data = torch.utils.data.TensorDataset(images, torch.arange(8) % 2)
loader = torch.utils.data.DataLoader(data, batch_size=4)
learn = Learner(DataLoaders(loader, loader), model, torch.nn.CrossEntropyLoss(), opt_func=SGD, path=".")
with learn.no_logging():
    learn.fit(1, lr=0.1)
assert not any(map(torch.equal, blocks(model), start))

trained = model.eval()(images)
learn.save("learner")
torch.nn.init.zeros_(model.fc.weight)
learn.load("learner")
assert torch.equal(model.eval()(images), trained)
se_inject.save(model, "model.safetensors")
assert torch.equal(se_inject.load("model.safetensors")(images), trained)
print(json.dumps({"identity": True, "blocks": len(start), "training": True, "save and load": True, "learn.save": True}))
