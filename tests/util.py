"""What several tests use: models with lived-in weights, and comparisons."""

from __future__ import annotations

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
    if isinstance(y, torch.Tensor):
        return y
    return torch.cat([total(i).flatten() for i in (y.values() if isinstance(y, dict) else y) if i is not None])


def check_identity(model: nn.Module, input_size: tuple[int, ...] | None = None, **options: Any) -> None:
    """The whole contract of an injection at ``init="identity"``, on one model; the model is changed."""
    size = input_size or input_sizes(model)[0]
    randomise(model).eval()
    x = torch.randn(2, *size, generator=torch.Generator().manual_seed(1))
    classes, keys = [type(m) for m in model.modules()], list(model.state_dict())
    expected, trained, grads = _run(model, x)

    assert se_inject.inject(model, input_size=size, **options) is model
    paths = block_paths(model)
    assert paths
    mine, mine_trained, mine_grads = _run(model, x)
    assert torch.equal(mine, expected)
    assert torch.equal(mine_trained, trained)
    for name, grad in grads.items():
        other = mine_grads[name]
        assert (grad is None) == (other is None), name
        assert grad is None or torch.equal(grad, other), name
    dead = _dead(paths, mine_grads)
    for seed in range(3, 9):  # drop path may have dropped a branch for both images
        if dead:
            dead = _dead(dead, _run(model, x, seed)[2])
    assert not dead, "these blocks do not learn"

    se_inject.eject(model)
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == classes
    with torch.no_grad():
        assert torch.equal(total(model(x)), expected)


def _dead(paths: list[str], grads: dict[str, torch.Tensor | None]) -> list[str]:
    """The blocks none of whose parameters has a gradient."""
    alive = {name for name, g in grads.items() if g is not None and g.abs().sum() > 0}
    return [p for p in paths if not any(name.startswith(f"{p}.") for name in alive)]


def _run(model: nn.Module, x: torch.Tensor, seed: int = 2) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor | None]]:
    """Outputs in eval and train mode, and the gradients of the latter; the model is in eval mode and as it was."""
    with torch.no_grad():
        evaluated = total(model(x))
    buffers = {name: t.clone() for name, t in model.named_buffers()}
    model.train()
    torch.manual_seed(seed)
    trained = total(model(x))
    (trained * torch.randn(trained.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, t in model.named_buffers():
            t.copy_(buffers[name])
    model.eval()
    return evaluated, trained.detach(), grads
