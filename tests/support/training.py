"""What is done to a model in training, and in other processes."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import se_inject
from se_inject import block_paths
from se_inject.blocks.squeeze_excite import SqueezeExcite
from se_inject.surgery.state import edits_of

from .families import Family, identity, plain
from .frameworks import assert_equal, check, gradients
from .processes import ddp, fsdp, output, pair, settled, two_steps


@check("autocast", identity)
def autocast(model: nn.Module, family: Family) -> None:
    """`torch.autocast` in bfloat16: at identity the outputs are the base's; every block has a gradient."""
    def run(m: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        def call(x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return m(x)
        return call

    x = family.image()
    with torch.no_grad():
        assert_equal(run(model)(x), run(plain(family))(x))
    grads = gradients(model.train(), run(model), x)
    assert all(g.isfinite().all() for g in grads.values())


@check("bfloat16", identity)
def bfloat16(model: nn.Module, family: Family) -> None:
    """`.bfloat16()`: at identity the outputs and the base's gradients are the base's."""
    x = family.image().bfloat16()
    other = plain(family).bfloat16()
    model.bfloat16()
    with torch.no_grad():
        assert_equal(model(x), other(x))
    mine, theirs = gradients(model.train(), model, x), gradients(other.train(), other, x)
    assert all(torch.equal(mine[k], g) for k, g in theirs.items())


@check("channels_last", identity)
def channels_last(model: nn.Module, family: Family) -> None:
    """At identity the outputs are the base's; no block changes the memory format."""
    def clear(t: torch.Tensor) -> bool:
        return t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()

    def keeps(block: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        seen.append(clear(args[0]))
        assert not seen[-1] or clear(output), "a block changes the memory format"

    seen: list[bool] = []
    model.to(memory_format=torch.channels_last)
    other = plain(family).to(memory_format=torch.channels_last)
    blocks = [model.get_submodule(p) for p in block_paths(model)]
    for block in blocks:
        block.register_forward_hook(keeps)
    x = family.image().contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert_equal(model(x), other(x))
    maps = any(isinstance(b, SqueezeExcite) and b.layout == "NCHW" for b in blocks)
    assert any(seen) or not maps, "no block got a map in channels_last"


@check("EMA")
def ema(model: nn.Module, family: Family) -> None:
    """`ModelEmaV2` and `ModelEmaV3` of timm average the blocks, too."""
    from timm.utils import ModelEmaV2, ModelEmaV3

    start = {k: t.clone() for k, t in model.state_dict().items()}
    averages = ModelEmaV2(model, decay=0.75), ModelEmaV3(model, decay=0.75)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
        now = {k: t.clone() for k, t in model.state_dict().items()}
        expected = {k: t * 0.75 + now[k] * 0.25 if t.is_floating_point() else now[k] for k, t in start.items()}
        for average in averages:
            average.update(model)
            torch.testing.assert_close(average.module.state_dict(), expected)
            model.load_state_dict(average.module.state_dict())
            assert_equal(output(settled(average.module), family.image()), output(settled(model), family.image()))
            model.load_state_dict(now)


@check("checkpointing")
def checkpointing(model: nn.Module, family: Family) -> None:
    """`set_grad_checkpointing`: what the base computes again is computed again; gradients equal."""
    def watch(m: nn.Module) -> nn.Module:
        calls.clear()
        for name, child in m.named_modules():
            child.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
        m.train().set_grad_checkpointing(True)
        return m

    calls: Counter[str] = Counter()
    expected = gradients(model.train(), model, family.image())
    found = gradients(watch(model), model, family.image())
    assert_equal(found, expected)
    mine = calls.copy()
    assert max(mine.values()) > 1, "nothing was computed again"
    other = watch(plain(family))
    gradients(other, other, family.image())
    assert all(mine[k] >= n for k, n in calls.items()), "less was computed again than in the base"


@check("func")
def func(model: nn.Module, family: Family) -> None:
    """`torch.func`: gradients for each sample by `vmap(grad)`, an ensemble by `stack_module_state`."""
    from torch.func import functional_call, grad, stack_module_state, vmap

    def loss(p: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
        y = functional_call(model, (p, buffers), (image[None],))
        return (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum()

    model, x = settled(model.double()), family.image().double()
    params = {k: p.detach() for k, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    with warnings.catch_warnings(action="ignore"):  # which operators are slow under vmap
        each = vmap(grad(loss), (None, 0))(params, x)
        for i in range(len(x)):
            torch.testing.assert_close(
                {k: t[i] for k, t in each.items()}, grad(loss)(params, x[i]),
                msg="vmap(grad) gives other gradients than grad, one by one")
        other = copy.deepcopy(model)
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(0.9)
            skeleton = copy.deepcopy(model).to("meta")
            both = vmap(lambda *state: functional_call(skeleton, state, (x,)))(*stack_module_state([model, other]))
            torch.testing.assert_close(both, torch.stack([model(x), other(x)]))


@check("worker process")
def worker(model: nn.Module, family: Family) -> None:
    """Pickled to a spawned process: outputs equal there."""
    x = family.image()
    for theirs in pair().run(output, model, x):
        assert_equal(theirs, output(model, x))


@check("DDP")
def ddp_(model: nn.Module, family: Family) -> None:
    """Two processes of `DistributedDataParallel`: gradients as of one with the whole batch; `se_inject.save` and `load`."""
    _compare_ranks(model, family, ddp)


@check("FSDP2")
def fsdp_(model: nn.Module, family: Family) -> None:
    """The same with `fully_shard` on every owner of a block; `se_inject.save` gathers the weights."""
    owners = [name for name, m in identity(family).named_modules() if name and edits_of(m) is not None]
    (state,) = _compare_ranks(model, family, fsdp, owners)
    torch.testing.assert_close(state, model.state_dict())


def _compare_ranks(model: nn.Module, family: Family, function: Callable[..., Any], *more: Any) -> list[Any]:
    """Two ranks must do what one process does with the whole batch; what else the first returns. `model` is trained."""
    model, x = settled(model.double()), family.image(4).double()
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.safetensors"
        (grads, losses, y, *rest), (other_grads, other_losses, other_y, *_) = pair().run(function, model, x, path, *more)
        loaded = se_inject.load(path, settled(copy.deepcopy(identity(family)).double())) if block_paths(model) else None
    assert_equal(grads, other_grads)
    assert_equal(y, other_y)
    expected, expected_losses = two_steps(model, model, x)
    torch.testing.assert_close(grads, expected)
    torch.testing.assert_close([(a + b) / 2 for a, b in zip(losses, other_losses)], expected_losses)
    if loaded is not None:
        assert_equal(output(loaded, x), y)
    return rest
