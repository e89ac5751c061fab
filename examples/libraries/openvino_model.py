"""OpenVINO: an injected model with blocks that gate, converted, gives the same outputs."""

import json

import openvino
import timm
import torch

import se_inject

torch.manual_seed(0)
model, images = timm.create_model("resnet18").eval(), torch.randn(2, 3, 64, 64)
before = model(images)
plan = se_inject.plan(model)
se_inject.inject(model)
assert torch.equal(model(images), before)
assert len(se_inject.block_paths(model)) == len(plan.sites)
for p in se_inject.se_parameters(model):
    torch.nn.init.normal_(p, std=0.1)

for net in (model, se_inject.optimize_for_inference(model)):
    converted = openvino.convert_model(net, example_input=images)
    compiled = openvino.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = torch.from_numpy(compiled(images.numpy())[0])
    torch.testing.assert_close(found, model(images), rtol=1e-3, atol=1e-4)
print(json.dumps({"identity": True, "blocks": len(plan.sites), "equal outputs": True, "optimized": True}))
