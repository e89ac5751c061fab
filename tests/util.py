"""What several tests use: models with lived-in weights, and comparisons."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

import se_inject
from se_inject.loading import block_paths
from se_inject.surgery import input_sizes


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give statistics, gains and zeroed layers random values, in place, as training would."""
    g = torch.Generator().manual_seed(seed)

    def noise(t: torch.Tensor) -> torch.Tensor:
        return torch.randn(t.shape, generator=g).to(t.dtype)

    for key, t in model.named_buffers():
        if key.endswith("running_var"):
            t.copy_(torch.rand(t.shape, generator=g) + 0.5)
        elif key.endswith("running_mean"):
            t.copy_(noise(t) * 0.1)
    for _, p in model.named_parameters():
        if p.numel() and p.abs().max() < 1e-3:
            p.add_(noise(p) * 0.1 + 0.1)
        elif p.dim() <= 1:
            p.add_(noise(p) * 0.1)
    return model


def total(y: Any) -> torch.Tensor:
    """The outputs of a model as one tensor."""
    return y if isinstance(y, torch.Tensor) else torch.cat([total(i).flatten() for i in y])


def check_identity(model: nn.Module, input_size: tuple[int, ...] | None = None, **options: Any) -> None:
    """The whole contract of an injection at ``init="identity"``, on one model; the model is changed."""
    size = input_size or input_sizes(model)[0]
    base = copy.deepcopy(randomise(model)).eval()
    x = torch.randn(2, *size, generator=torch.Generator().manual_seed(1))
    model.eval()
    classes = [type(m) for m in model.modules()]
    assert se_inject.inject(model, input_size=size, **options) is model
    with torch.no_grad():
        assert torch.equal(total(base(x)), total(model(x)))

    outputs = []
    for m in (base, model):
        m.train()
        torch.manual_seed(2)
        outputs.append(total(m(x)))
    assert torch.equal(*outputs)
    weights = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(3))
    for y in outputs:
        (y * weights).sum().backward()
    mine = dict(model.named_parameters())
    for name, p in base.named_parameters():
        q = mine[name].grad
        assert (p.grad is None) == (q is None), name
        assert p.grad is None or torch.equal(p.grad, q), name
    paths = block_paths(model)
    assert paths
    for path in paths:
        grads = [p.grad for p in model.get_submodule(path).parameters()]
        assert any(g is not None and g.abs().sum() > 0 for g in grads), f"{path} does not learn"

    se_inject.eject(model)
    assert list(model.state_dict()) == list(base.state_dict())
    assert [type(m) for m in model.modules()] == classes
    base.eval()
    model.eval()
    with torch.no_grad():
        assert torch.equal(total(base(x)), total(model(x)))
