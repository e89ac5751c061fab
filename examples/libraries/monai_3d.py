"""MONAI: nets for volumes, (N, C, D, H, W)."""

import json

import torch
from monai.networks import nets
from torch.nn.utils import parameters_to_vector

import se_inject

NETS = {
    "DenseNet": lambda: nets.DenseNet121(3, 1, 2, block_config=(2, 2, 2)),
    "ResNet": lambda: nets.resnet10(spatial_dims=3, n_input_channels=1, num_classes=2),
    "UNet": lambda: nets.UNet(3, 1, 2, channels=(8, 16, 32), strides=(2, 2), num_res_units=2),
    "SEResNet": lambda: nets.SEResNet50(spatial_dims=3, in_channels=1, num_classes=2, layers=(1, 1, 1, 1)),
}


def blocks(model):
    return [parameters_to_vector(model.get_submodule(path).parameters()).detach() for path in se_inject.block_paths(model)]


torch.manual_seed(0)
volumes, count = torch.randn(2, 1, 32, 32, 32), 0
for name, make in NETS.items():
    model = make().eval()
    before = model(volumes)
    options = {"input_size": (1, 32, 32, 32), "existing": "stack"}
    plan = se_inject.plan(model, **options)
    se_inject.inject(model, **options)
    assert torch.equal(model(volumes), before)
    start = blocks(model)
    assert len(start) == len(plan.sites)
    count += len(start)

    model.train()(volumes).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not any(map(torch.equal, blocks(model), start))

    se_inject.save(model.eval(), f"{name}.safetensors")
    again = se_inject.load(f"{name}.safetensors", model=make().eval())
    assert torch.equal(again(volumes), model(volumes))
    torch.testing.assert_close(se_inject.optimize_for_inference(again)(volumes), model(volumes), rtol=1e-3, atol=1e-4)
print(json.dumps({"identity": True, "blocks": count, "training": True, "save and load": True, "optimized": True}))
