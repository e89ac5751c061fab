"""Which of timm's models with attention are another model of timm's and attention: ``python -m tests.contract.census``."""

from __future__ import annotations

from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from timm.layers import EcaModule, EffectiveSEModule, GlobalContext, SEModule
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import nn

from se_inject.timm_names import skeleton
from se_inject.tools import zoo

BLOCKS = {SEModule: "se", SqueezeExcite: "se", EffectiveSEModule: "ese", EcaModule: "eca", GlobalContext: "gc"}


def block_of(module: nn.Module) -> str | None:
    """The block that a module is, by timm's ``create_attn`` name; a global context that is added is ``gca``."""
    return "gca" if getattr(module, "mlp_add", None) is not None else BLOCKS.get(type(module))


def outline(name: str) -> tuple[str, frozenset[str], tuple[tuple[str, torch.Size], ...]]:
    """The blocks of a model, and the names and shapes of its tensors without them."""
    model = skeleton(name)
    blocks = {path: block for path, m in model.named_modules() if (block := block_of(m)) is not None}
    inside = tuple(f"{path}." for path in blocks)
    rest = tuple((k, t.shape) for k, t in model.state_dict().items() if not (inside and k.startswith(inside)))
    return name, frozenset(blocks.values()), rest


def census() -> dict[str, tuple[str, list[str]]]:
    """For each native model its block, and the models without attention that have all its other tensors."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        outlines = list(pool.map(outline, zoo.names("*"), chunksize=16))
    bases = defaultdict(list)
    for name, blocks, rest in outlines:
        if not blocks:
            bases[rest].append(name)
    return {
        name: (next(iter(blocks)), bases[rest]) for name, blocks, rest in outlines if len(blocks) == 1 and rest in bases}


if __name__ == "__main__":
    for native, (block, bases) in census().items():
        print(native, block, *bases)
