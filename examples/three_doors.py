"""Three ways to the same injected model, with its outputs unchanged until it is trained."""

import tempfile
from pathlib import Path

import timm
import torch

import se_inject

x = torch.randn(1, 3, 64, 64)

# timm's door
model = timm.create_model("se_inject/resnet18", se_ratio=1 / 8, num_classes=10).eval()

# the Python door
base = timm.create_model("resnet18", num_classes=10).eval()
with torch.no_grad():
    before = base(x)
    se_inject.inject(base, ratio=1 / 8)
    assert torch.equal(base(x), before)

# a file is enough to rebuild the model
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "model.safetensors"
    se_inject.save(base, path)
    again = se_inject.load(path)
    with torch.no_grad():
        assert torch.equal(again(x), before)

print(se_inject.plan(model, existing="stack"))
