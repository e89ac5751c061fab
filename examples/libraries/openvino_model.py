"""OpenVINO: an injected model, trained by one step and converted, gives the same outputs."""

import json

import openvino
import timm
import torch
from torch.nn.utils import parameters_to_vector

import se_inject


def blocks(model):
    return [parameters_to_vector(model.get_submodule(path).parameters()).detach() for path in se_inject.block_paths(model)]


torch.manual_seed(0)
model, images = timm.create_model("resnet18", zero_init_last=False).eval(), torch.randn(2, 3, 64, 64)
before = model(images)
plan = se_inject.plan(model)
se_inject.inject(model)
assert torch.equal(model(images), before)
start = blocks(model)
assert len(start) == len(plan.sites)

model.train()
model(images).square().mean().backward()
torch.optim.SGD(model.parameters(), lr=1.0).step()
assert not any(map(torch.equal, blocks(model), start))
se_inject.save(model.eval(), "model.safetensors")
again = se_inject.load("model.safetensors")
assert torch.equal(again(images), model(images))

for net in (again, se_inject.optimize_for_inference(again)):
    converted = openvino.convert_model(net, example_input=images)
    compiled = openvino.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = torch.from_numpy(compiled(images.numpy())[0])
    torch.testing.assert_close(found, again(images), rtol=1e-3, atol=1e-4)
checks = {"identity": True, "blocks": len(start), "training": True, "save and load": True}
print(json.dumps({**checks, "close outputs": True, "optimized": True}))
