"""The models that a benchmark compares: a base, the base with blocks, timm's own twin, others; each also optimised."""

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
from ..rescale.native import to_native
from ..surgery.pipeline import inject
from ..surgery.state import block_paths
from ..timm_names import base_name, skeleton, split_options

BASE, INJECTED, NATIVE = "base", "injected", "native"
OPTIMIZED = ", optimised"
TOLERANCE = 1e-5  # of the largest output, in float32


@dataclasses.dataclass(frozen=True)
class Variant:
    """One model of a comparison.

    Attributes:
        name: ``base``, ``injected``, ``native``, or as another model was asked for; with `OPTIMISED` behind it.
        architecture: Its timm name.
        model: The module; variants share no memory.
        params, blocks: Parameters, and how many blocks are injected, before it was optimised.
        deviation: Of an optimised model: the largest difference of an output to the plain model's, over the largest output.
    """

    name: str
    architecture: str
    model: nn.Module
    params: int
    blocks: int
    deviation: float | None = None

    @property
    def optimised(self) -> bool:
        return self.name.endswith(OPTIMIZED)

    @classmethod
    def plain(cls, name: str, architecture: str, model: nn.Module) -> Variant:
        return cls(name, architecture, model, sum(p.numel() for p in model.parameters()), len(block_paths(model)))


def plain_variants(
    name: str, config: SEConfig, args: Mapping[str, Any], others: Sequence[tuple[str, Mapping[str, Any]]] = (),
    native: bool = True,
) -> list[Variant]:  # fmt: skip
    """The base `name`, the base with blocks, its native twin if timm has one, and others, in eval mode on the CPU.

    What starts as a constant (statistics, zeroed layers, layer scales) has values as after training, so that nothing vanishes
    on the way and no block is an identity. Base, injected and native have the same weights.

    Args:
        name: A timm name.
        config: The injection's options.
        args: Arguments of `timm.create_model`.
        others: Names and arguments of further models.
        native: Whether to look for the twin, which takes seconds where there is none.

    Raises:
        ConfigError: timm does not know a name, or an argument.
        NoSitesError: There is nothing to inject.
    """
    base = lived_in(create(name, args))
    injected = lived_in(inject(copy.deepcopy(base), config), block_paths)
    out = [Variant.plain(BASE, name, base), Variant.plain(INJECTED, f"se_inject/{name}", injected)]
    twin = _native(injected) if native else None
    if twin is not None:
        out.append(Variant.plain(NATIVE, *twin))
    for other, given in others:
        label = " ".join([other, *(f"{k}={v}".replace(" ", "") for k, v in given.items())])
        out.append(Variant.plain(label, other, lived_in(create(other, given))))
    return out


def create(name: str, args: Mapping[str, Any]) -> nn.Module:
    """A new timm model with random weights, in eval mode.

    Raises:
        ConfigError: timm has no such model, or does not know an argument.
    """
    import timm

    _outline(name, args)  # its messages, and no weights are drawn for a model that cannot be made
    model: nn.Module = timm.create_model(name, **args)
    return model.eval()


def _outline(name: str, args: Mapping[str, Any]) -> nn.Module:
    """The base of a model, without values; `name` may be a twin's, with ``se_`` arguments.

    Raises:
        ConfigError: timm has no such model, or does not know an argument.
    """
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
def lived_in(model: nn.Module, inside: Any = None) -> nn.Module:
    """Give statistics, zeroed layers and tiny scales values as training would, in place, and return the model.

    Args:
        model: On the CPU.
        inside: A function of the model that gives dotted names, below which alone this is done; None is everywhere.
    """
    generator = torch.Generator().manual_seed(0)
    prefixes = ("",) if inside is None else tuple(f"{path}." for path in inside(model))

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
    """An optimised copy of a variant, which is compared with the plain one on `images`, in float32.

    Where the plain model's own rounding is above `TOLERANCE`, both are compared with it in float64: the copy may be off by
    twice as much.

    Raises:
        SEInjectError: Their outputs differ by more.
    """
    from ..inference.optimize import optimize_for_inference

    model: nn.Module = optimize_for_inference(variant.model)
    difference = deviation(variant.model, model, images)
    if not (difference <= TOLERANCE or _is_rounding(variant.model, model, images)):  # NaN is none, too
        raise SEInjectError(
            f"{variant.architecture}, optimised: its outputs differ from the plain model's by {difference:.1e} of the largest, "
            f"which is above {TOLERANCE:g} and no rounding of its own: nothing was timed; this is a defect of se_inject, or "
            "outputs that are not finite")
    return dataclasses.replace(variant, name=variant.name + OPTIMIZED, model=model, deviation=difference)


def _is_rounding(plain: nn.Module, other: nn.Module, images: torch.Tensor) -> bool:
    """Whether a copy is off from the model in float64 by at most twice as much as the model itself."""
    exact = copy.deepcopy(plain).double()
    return _off(exact, other, images) <= 2 * _off(exact, plain, images)


@torch.inference_mode()
def _off(exact: nn.Module, other: nn.Module, images: torch.Tensor) -> float:
    pairs = list(zip(outputs(exact(images.double())), outputs(other(images)), strict=True))
    return max(float((a - b).abs().max()) for a, b in pairs) / max(float(a.abs().max()) for a, _ in pairs)


@torch.inference_mode()
def deviation(plain: nn.Module, other: nn.Module, images: torch.Tensor) -> float:
    """The largest difference between two models' outputs, over the largest output of the first."""
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        pairs = list(zip(outputs(plain(images)), outputs(other(images)), strict=True))
    largest = max(float(a.abs().max()) for a, _ in pairs)
    difference = max(float((a - b).abs().max()) for a, b in pairs)
    return difference / largest if largest else float(difference != 0)


def outputs(y: Any) -> list[torch.Tensor]:
    """The tensors that a model returns."""
    if isinstance(y, torch.Tensor):
        return [y]
    values: Iterable[Any] = y.values() if isinstance(y, dict) else y
    return [t for v in values if v is not None for t in outputs(v)]


def image_size(name: str, args: Mapping[str, Any], side: int | None) -> tuple[int, ...]:
    """The (C, H, W) of the images for a model: its own, or `side` squared.

    Raises:
        ConfigError: timm does not know the name, or the model does not take the size.
    """
    model = _outline(name, args)
    own = input_sizes(model)[0]
    size = own if side is None else (own[0], side, side)
    if side is not None and not runs_on(model, size):
        raise ConfigError(f"--size {side}: {name} takes images of {own[1]} x {own[2]} and not of {side} x {side}; write "
                          f"--model-kwargs img_size={side}, or leave --size out")
    return size
