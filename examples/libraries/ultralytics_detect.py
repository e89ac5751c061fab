"""ultralytics: YOLO v8 and 11 detection models, and their fuse()."""

import json

import torch
from torch.nn.utils import parameters_to_vector
from ultralytics.nn.tasks import DetectionModel

import se_inject


def blocks(model):
    return [parameters_to_vector(model.get_submodule(path).parameters()).detach() for path in se_inject.block_paths(model)]


torch.manual_seed(0)
images, count = torch.rand(2, 3, 64, 64), 0
for name in ("yolov8n.yaml", "yolo11n.yaml"):
    model = DetectionModel(name, verbose=False).eval()
    before = model(images)[0]
    plan = se_inject.plan(model, input_size=(3, 64, 64))
    se_inject.inject(model, input_size=(3, 64, 64))
    assert torch.equal(model(images)[0], before)
    start = blocks(model)
    assert len(start) == len(plan.sites)
    count += len(start)

    outputs = model.train()(images)
    sum(t.square().mean() for t in torch.utils._pytree.tree_leaves(outputs)).backward()
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    assert not any(map(torch.equal, blocks(model), start))

    se_inject.save(model.eval(), f"{name}.safetensors")
    again = se_inject.load(f"{name}.safetensors", model=DetectionModel(name, verbose=False).eval())
    assert torch.equal(again(images)[0], model(images)[0])
    torch.testing.assert_close(again.fuse(verbose=False)(images)[0], model(images)[0], rtol=1e-3, atol=1e-3)
print(json.dumps({"identity": True, "blocks": count, "training": True, "save and load": True, "fuse": True}))
