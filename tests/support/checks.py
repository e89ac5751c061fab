"""What several tests use: models with lived-in weights, and comparisons."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import se_inject
from se_inject import block_paths, input_sizes


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


def channels_of(model: nn.Module) -> int:
    """The channels of the images that a model takes: those of its first convolution."""
    return next(m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d))


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
    grads: dict[str, torch.Tensor] = {}
    expected, trained = _run(model, x, grads.__setitem__)

    assert se_inject.inject(model, input_size=size, **options) is model
    paths = block_paths(model)
    assert paths
    same: dict[str, bool] = {}
    alive: set[str] = set()

    def compare(name: str, grad: torch.Tensor) -> None:
        if any(name.startswith(f"{path}.") for path in paths):
            alive.update([name] if grad.abs().sum() > 0 else [])
        else:
            same[name] = torch.equal(grad, grads[name])

    mine, mine_trained = _run(model, x, compare)
    assert torch.equal(mine, expected)
    assert torch.equal(mine_trained, trained)
    assert same.keys() == grads.keys()
    assert all(same.values()), [name for name, equal in same.items() if not equal]
    for seed in range(3, 9):  # drop path may have dropped a branch for both images
        if _dead(paths, alive):
            _run(model, x, compare, seed)
    assert not _dead(paths, alive), "these blocks do not learn"

    se_inject.eject(model)
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == classes
    with torch.no_grad():
        assert torch.equal(total(model(x)), expected)


def _dead(paths: list[str], alive: set[str]) -> list[str]:
    """The blocks none of whose parameters is alive."""
    return [p for p in paths if not any(name.startswith(f"{p}.") for name in alive)]


def _run(
    model: nn.Module, x: torch.Tensor, receive: Callable[[str, torch.Tensor], object], seed: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs in eval and train mode; the model is in eval mode and as it was.

    `receive` is given each gradient of the latter when it is there, and it is not kept: two sets of gradients of
    the largest models, beside each other, would be too much.
    """
    with torch.no_grad():
        evaluated = total(model(x))
    buffers = {name: t.clone() for name, t in model.named_buffers()}
    model.train()
    torch.manual_seed(seed)
    trained = total(model(x))

    def handle(name: str, p: torch.Tensor) -> None:
        assert p.grad is not None
        receive(name, p.grad)
        p.grad = None

    handles = [
        p.register_post_accumulate_grad_hook(functools.partial(handle, name))
        for name, p in model.named_parameters() if p.requires_grad]
    (trained * torch.randn(trained.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    for h in handles:
        h.remove()
    with torch.no_grad():
        for name, t in model.named_buffers():
            t.copy_(buffers[name])
    model.eval()
    return evaluated, trained.detach()
