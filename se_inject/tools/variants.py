"""The models that a benchmark compares: a base, the base with blocks, timm's native twin, others; each also optimized."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..capture.inputs import input_sizes, runs_on
from ..config import SEConfig
from ..errors import ConfigError, SEInjectError
from ..inference.optimize import optimize_for_inference
from ..rescale.native import to_native
from ..surgery.pipeline import inject
from ..surgery.state import block_paths
from ..timm_names import base_name, skeleton, split_options
from .outputs import deviation, run

BASE, INJECTED, NATIVE = "base", "injected", "native"
OPTIMIZED = ", optimized"
TOLERANCE = 1e-5  # the largest deviation of an optimized model in float32


@dataclasses.dataclass(frozen=True)
class Variant:
    """One model of a comparison.

    Attributes:
        name: ``base``, ``injected``, ``native``, or a further model's name and arguments; an optimized model has
            `OPTIMIZED` at the end.
        architecture: Its timm name.
        model: The module. Variants share no memory.
        params: Number of parameters, before the model was optimized.
        blocks: Number of injected blocks, before the model was optimized.
        deviation: The deviation of an optimized model's outputs from the plain model's; see `outputs.deviation`.
    """

    name: str
    architecture: str
    model: nn.Module
    params: int
    blocks: int
    deviation: float | None = None

    @property
    def is_optimized(self) -> bool:
        return self.name.endswith(OPTIMIZED)

    @classmethod
    def plain(cls, name: str, architecture: str, model: nn.Module) -> Variant:
        return cls(name, architecture, model, sum(p.numel() for p in model.parameters()), len(block_paths(model)))


def plain_variants(
    name: str, config: SEConfig, args: Mapping[str, Any], others: Sequence[tuple[str, Mapping[str, Any]]] = (),
    native: bool = True,
) -> list[Variant]:  # fmt: skip
    """The base `name`, the base with blocks, its native twin if timm has one, and others, in eval mode on the CPU.

    The models are `as_if_trained`, so that no block is an identity. Base, injected and native have the same weights.

    Args:
        name: A timm name.
        config: The options of the injection.
        args: Arguments of `timm.create_model`.
        others: Names and arguments of further models.
        native: Whether to look for the native twin; this takes seconds if there is none.

    Raises:
        ConfigError: timm does not know a name or an argument.
        NoSitesError: There is nothing to inject.
    """
    base = as_if_trained(create(name, args))
    injected = inject(copy.deepcopy(base), config)
    as_if_trained(injected, block_paths(injected))
    variants = [Variant.plain(BASE, name, base), Variant.plain(INJECTED, f"se_inject/{name}", injected)]
    twin = _native(injected) if native else None
    if twin is not None:
        variants.append(Variant.plain(NATIVE, *twin))
    for other, other_args in others:
        label = " ".join([other, *(f"{k}={v}".replace(" ", "") for k, v in other_args.items())])
        variants.append(Variant.plain(label, other, as_if_trained(create(other, other_args))))
    return variants


def create(name: str, args: Mapping[str, Any]) -> nn.Module:
    """A new timm model with random weights, in eval mode.

    Raises:
        ConfigError: timm does not know the name or an argument.
    """
    import timm

    _skeleton(name, args)  # raises the error before any weights are drawn
    model: nn.Module = timm.create_model(name, **args)
    return model.eval()


def _skeleton(name: str, args: Mapping[str, Any]) -> nn.Module:
    """`skeleton` for a base or for a twin with ``se_`` arguments: the base in either case."""
    twin = base_name(name) != name
    return skeleton(name, **(split_options(dict(args))[1] if twin else args))


def _native(injected: nn.Module) -> tuple[str, nn.Module] | None:
    try:
        weights = to_native(injected)
    except SEInjectError:
        return None
    model = create(weights.architecture, weights.model_args)
    model.load_state_dict(weights)
    return weights.architecture, model


@torch.no_grad()
def as_if_trained(model: nn.Module, paths: Iterable[str] | None = None) -> nn.Module:
    """Give running statistics, zeroed layers and tiny scales nonzero values, in place, and return the model.

    The zeros of a new model hide what its blocks compute, and zeros take another time than other numbers.

    Args:
        model: A model on the CPU.
        paths: Only the submodules with these dotted names; None is the whole model.
    """
    generator = torch.Generator().manual_seed(0)
    prefixes = ("",) if paths is None else tuple(f"{path}." for path in paths)

    def noise(t: torch.Tensor) -> torch.Tensor:
        return torch.randn(t.shape, generator=generator).to(t.dtype)

    for key, t in model.named_buffers():
        if key.startswith(prefixes) and key.endswith("running_var"):
            t.copy_(torch.rand(t.shape, generator=generator) + 0.5)
        elif key.startswith(prefixes) and key.endswith("running_mean"):
            t.copy_(noise(t) * 0.1)
    for key, p in model.named_parameters():
        if key.startswith(prefixes) and p.numel() and p.abs().max() < 1e-3:
            p.add_(noise(p) * 0.1 + 0.1)
    return model


def optimized(variant: Variant, images: torch.Tensor) -> Variant:
    """An optimized copy of a variant, with its deviation from the plain model on `images`, in float32.

    A deviation above `TOLERANCE` is accepted only where the plain model's own rounding is as large: against the plain
    model in float64, the copy may deviate by twice as much as the plain model in float32.

    Raises:
        SEInjectError: The deviation is larger.
    """
    model: nn.Module = optimize_for_inference(variant.model)
    found = deviation(run(variant.model, images), run(model, images))
    if not (found <= TOLERANCE or _is_rounding(variant.model, model, images)):  # not `>`: NaN is an error, too
        raise SEInjectError(
            f"{variant.architecture}, optimized: its outputs deviate from the plain model's by {found:.1e} of the largest "
            f"output, more than {TOLERANCE:g} and more than rounding explains; nothing was timed. This is a defect of "
            "se_inject, or the outputs are not finite: check them with torch.isfinite")
    return dataclasses.replace(variant, name=variant.name + OPTIMIZED, model=model, deviation=found)


def _is_rounding(plain: nn.Module, other: nn.Module, images: torch.Tensor) -> bool:
    exact = run(copy.deepcopy(plain).double(), images.double())
    return deviation(exact, run(other, images)) <= 2 * deviation(exact, run(plain, images))


def image_size(name: str, args: Mapping[str, Any], side: int | None) -> tuple[int, ...]:
    """The (C, H, W) of the images for a model: the model's own, or `side` squared.

    Raises:
        ConfigError: timm does not know the name, or the model does not take the size.
    """
    model = _skeleton(name, args)
    own = input_sizes(model)[0]
    size = own if side is None else (own[0], side, side)
    if side is not None and not runs_on(model, size):
        raise ConfigError(f"--size {side}: {name} takes images of {own[1]} x {own[2]}, not of {side} x {side}: write "
                          f"--model-kwargs img_size={side}, or leave --size out")
    return size
