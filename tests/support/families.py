"""One small model of each of several families: all kinds of rewriting, all layouts, each kind of site."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import pytest
import timm
import torch
from torch import nn

import se_inject
from se_inject import block_paths

from .checks import randomise


@dataclasses.dataclass(frozen=True)
class Family:
    """A timm model made small: by timm's arguments, and by the length of some of its sequences."""

    name: str
    side: int
    cut: tuple[tuple[str, int], ...] = ()
    args: tuple[tuple[str, Any], ...] = ()

    def create(self) -> nn.Module:
        torch.manual_seed(0)
        model = timm.create_model(self.name, num_classes=10, **dict(self.args))
        for path, length in self.cut:
            children = model.get_submodule(path)._modules
            for child in list(children)[length:]:
                del children[child]
        return randomise(model).eval()

    def call(self) -> str:
        """How timm is asked for it."""
        args = "".join(f", {k}={v:.3g}" if isinstance(v, float) else f", {k}={v}" for k, v in self.args)
        cut = ", cut short" if self.cut else ""
        return f"`{self.name}{args}`{cut}"

    def image(self, batch: int = 2) -> torch.Tensor:
        return torch.randn(batch, 3, self.side, self.side, generator=torch.Generator().manual_seed(1))


def small(name: str, side: int, cut: dict[str, int] | None = None, **args: Any) -> Family:
    return Family(name, side, tuple((cut or {}).items()), tuple(args.items()))


# every kind of rewriting, every layout and every kind of site: the rest differ in their owners, not in what is done to them
QUICK = ("resnet18", "mobilenetv2_050", "repvgg_a0", "vgg11_bn", "densenet121", "convnext_atto", "levit_128s",
         "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "resmlp_12_224")
FAMILIES = [
    small("resnet18", 64, layers=(1, 1, 1, 1)),
    small("mobilenetv2_050", 64, depth_multiplier=0.3),
    small("nf_resnet26", 64, depths=(1, 1, 1, 1)),
    small("repvgg_a0", 64, {"stages.0": 1, "stages.1": 1, "stages.2": 2, "stages.3": 1}),
    small("vgg11_bn", 64, mlp_ratio=1 / 64),
    small("densenet121", 64, block_config=(2, 2, 2, 2)),
    small("hgnetv2_b0", 64),
    small("convnext_atto", 64, depths=(1, 1, 1, 1)),
    small("caformer_s18", 64, {f"stages.{i}.blocks": 1 for i in range(4)}),
    small("mobilevitv2_050", 64),
    small("efficientformerv2_s0", 64, img_size=64, depths=(1, 1, 1, 2)),
    small("levit_128s", 64, img_size=64, depth=(1, 1, 1)),
    small("tiny_vit_5m_224", 64, depths=(1, 1, 1, 1)),
    small("vit_tiny_patch16_224", 64, img_size=64, depth=2),
    small("swin_tiny_patch4_window7_224", 64, img_size=64, depths=(2, 1, 1), num_heads=(1, 2, 4), embed_dim=32, window_size=4),
    small("hiera_tiny_224", 64, img_size=64, stages=(1, 1, 1, 1), embed_dim=32),
    small("xcit_nano_12_p16_224", 64, img_size=64, depth=2),
    small("resmlp_12_224", 64, {"blocks": 2}, img_size=64),
]

BY_TIER = [pytest.param(f, id=f.name, marks=() if f.name in QUICK else pytest.mark.contract) for f in FAMILIES]


@functools.cache
def base(family: Family) -> nn.Module:
    return family.create()


def plain(family: Family) -> nn.Module:
    """A base to do with what one likes: some keep what they computed."""
    return copy.deepcopy(base(family))


@functools.cache
def identity(family: Family) -> nn.Module:
    """The base with blocks as they start."""
    return se_inject.inject(plain(family), input_size=(3, family.side, family.side))


@functools.cache
def trained(family: Family) -> nn.Module:
    """The base with blocks that gate."""
    model = copy.deepcopy(identity(family))
    for i, path in enumerate(block_paths(model)):
        randomise(model.get_submodule(path), i)
    return model
