"""accelerate: a loop over a prepared model, whose state is saved and goes on."""

import json

import timm
import torch
from accelerate import Accelerator
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

accelerator = Accelerator(cpu=True)
data = torch.utils.data.TensorDataset(images, torch.arange(8) % 2)
wrapped, optimizer, loader = accelerator.prepare(
    model.train(), torch.optim.SGD(model.parameters(), lr=0.1), torch.utils.data.DataLoader(data, batch_size=4))
for batch, labels in loader:
    optimizer.zero_grad()
    accelerator.backward(torch.nn.functional.cross_entropy(wrapped(batch), labels))
    optimizer.step()
assert not any(map(torch.equal, blocks(model), start))

trained = model.eval()(images)
accelerator.save_state("state")
torch.nn.init.zeros_(model.fc.weight)
accelerator.load_state("state")
assert torch.equal(model(images), trained)
se_inject.save(accelerator.unwrap_model(wrapped), "model.safetensors")
assert torch.equal(se_inject.load("model.safetensors")(images), trained)
print(json.dumps({"identity": True, "blocks": len(start), "training": True, "save and load": True, "save_state": True}))
