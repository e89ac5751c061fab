"""The last net: base and injected model are run and compared, with the blocks held at identity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..capture.example import Example, Inputs
from ..capture.inputs import dtype_of
from ..capture.values import equal
from ..errors import SEInjectError
from ..undo import entered


def check_outputs(
    base: nn.Module, model: nn.Module, blocks: Mapping[str, float], inputs: Inputs, size: tuple[int, ...]
) -> None:
    """Run a base and the same model with blocks on random inputs, in eval and in train mode, and compare all outputs.

    Each block returns its input instead, whatever its weights are. Both models should be copies, as they are run.

    Args:
        base: The model before the injection.
        model: The model after it.
        blocks: The blocks' paths, each with the factor that the model puts behind the block.
        inputs: What the injection was given.
        size: (C, H, W) of the images where it was given nothing.

    Raises:
        SEInjectError: Outputs are not equal; the message names the first module whose output differs.
    """
    for path, factor in blocks.items():
        model.get_submodule(path).register_forward_hook(lambda _, args, output, factor=factor: args[0] / factor)
    device = next((p.device for p in base.parameters()), torch.device("cpu"))
    example = inputs if isinstance(inputs, Example) else Example.images(size, dtype_of(base))
    example = example.enlarged().filled(device)  # norms in train mode need more than one value for each channel
    modules = {path for path, _ in base.named_modules()}
    for training in (False, True):
        outputs: list[list[tuple[str, Any]]] = []
        for m in (base, model):
            m.train(training)
            seen: list[tuple[str, Any]] = []
            handles = [
                child.register_forward_hook(lambda _, args, y, path=path, seen=seen: seen.append((path, _detached(y))))
                for path, child in m.named_modules() if path in modules]
            with entered(torch.no_grad()), torch.random.fork_rng(range(torch.cuda.device_count())):
                torch.manual_seed(0)
                example.run(m)
            for handle in handles:
                handle.remove()
            outputs.append(seen)
        for (path, expected), (other, found) in zip(*outputs):
            if path != other or not equal(expected, found):
                where = f"module {path!r}" if path else "the model"
                raise SEInjectError(
                    f"inject({type(base).__name__}, verify=True): the output of {where} "
                    f"({type(base.get_submodule(path)).__name__}) differs from the base's in {'train' if training else 'eval'} "
                    f"mode; the injection was undone: exclude its blocks, as in exclude={path + '*'!r}, and report the model")


def _detached(value: Any) -> Any:
    """A copy of a value, which later writes in place do not change."""
    return torch.utils._pytree.tree_map(lambda t: t.detach().clone() if isinstance(t, torch.Tensor) else t, value)
