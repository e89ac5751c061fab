"""torchvision: Faster R-CNN, RetinaNet and Mask R-CNN, which take lists of images."""

import json

import torch
from torch.nn.utils import parameters_to_vector
from torchvision.models import get_model

import se_inject


def make(name):
    shown = {"score_thresh": 0.0} if "retinanet" in name else {"box_score_thresh": 0.0}  # boxes of random weights, too
    return get_model(name, weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=96, **shown).eval()


def blocks(model):
    return [parameters_to_vector(model.get_submodule(path).parameters()).detach() for path in se_inject.block_paths(model)]


def equal(found, expected):
    return all(len(a[key]) and torch.equal(a[key], b[key]) for a, b in zip(found, expected) for key in a)


torch.manual_seed(0)
images, count = [torch.rand(3, 64, 96), torch.rand(3, 64, 64)], 0
boxes, masks = torch.tensor([[8.0, 8, 40, 40]]), torch.ones(1, 64, 96, dtype=torch.uint8)
targets = [{"boxes": boxes, "labels": torch.tensor([1]), "masks": masks[:, :, :image.shape[2]]} for image in images]
for name in ("fasterrcnn_mobilenet_v3_large_320_fpn", "retinanet_resnet50_fpn", "maskrcnn_resnet50_fpn"):
    model = make(name)
    before = model(images)
    plan = se_inject.plan(model, example_inputs=(images,))
    se_inject.inject(model, example_inputs=(images,))
    assert equal(model(images), before)
    start = blocks(model)
    assert len(start) == len(plan.sites)
    count += len(start)

    sum(model.train()(images, targets).values()).backward()
    torch.optim.SGD(model.parameters(), lr=1e-4).step()
    assert not any(map(torch.equal, blocks(model), start))

    se_inject.save(model.eval(), f"{name}.safetensors")
    assert equal(se_inject.load(f"{name}.safetensors", model=make(name))(images), model(images))
print(json.dumps({"identity": True, "blocks": count, "training": True, "save and load": True}))
