"""An image, and what a model makes of it."""

from __future__ import annotations

import torch

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def out(model):
    with torch.no_grad():
        return model.eval()(X)
