"""ONNX Runtime: an injected model with blocks that gate, exported by torch.onnx, gives the same outputs."""

import json

import onnxruntime
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

for name, net in {"model": model, "optimized": se_inject.optimize_for_inference(model)}.items():
    torch.onnx.export(net, (images,), f"{name}.onnx", dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch")},))
    session = onnxruntime.InferenceSession(f"{name}.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: torch.cat([images, images]).numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(torch.cat([images, images])), rtol=1e-3, atol=1e-4)
print(json.dumps({"identity": True, "blocks": len(plan.sites), "equal outputs": True, "optimized": True}))
