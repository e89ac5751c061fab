"""What a model takes: its input sizes, and a recorded run on one of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..errors import ConfigError, TraceError
from ..undo import entered
from .calls import Run
from .channels import BATCH_AXIS, CHANNEL_AXIS, mark
from .meta_ops import MetaOps
from .recording import record, run
from .snapshot import on_meta

BATCH = 2  # images in the recorded run; more than one, so that no size of 1 stands for two things


def checked_size(size: object) -> tuple[int, ...]:
    if isinstance(size, (tuple, list)) and len(size) == 3 and all(type(n) is int and n > 0 for n in size):
        return tuple(size)
    raise ConfigError(f"input_size={size!r}: expected (C, H, W), three whole numbers above 0, such as (3, 224, 224)")


def record_model(model: nn.Module, size: tuple[int, ...] | None = None) -> Run:
    """The recorded run of a model on an input of this (C, H, W), or of the likeliest size that it takes.

    Use it inside `on_meta`.

    Raises:
        ConfigError: It is no (C, H, W).
        TraceError: The model does not take it; without `size`, the error is that of the likeliest.
    """
    first: TraceError | None = None
    sizes = input_sizes(model) if size is None else [checked_size(size)]
    dtypes = dict.fromkeys([dtype_of(model), *(p.dtype for p in model.parameters() if p.is_floating_point())])
    for (channels, *sides), dtype in itertools.product(sizes, dtypes):
        images = torch.empty(BATCH, channels, *sides, device="meta", dtype=dtype)
        mark(images, 0, BATCH_AXIS)
        mark(images, 1, CHANNEL_AXIS)
        try:
            root, macs = record(model, images)
            return Run(root, (channels, *sides), macs // BATCH)
        except TraceError as error:
            first = first or error
    assert first is not None
    raise first


def input_sizes(model: nn.Module) -> list[tuple[int, ...]]:
    """Return the input sizes that a model may take, likeliest first. Runs nothing, and changes nothing.

    A timm model has its own size. For other models, the first convolution gives the channels, and the size is that of
    ImageNet or CIFAR.

    Args:
        model: A model.

    Returns:
        A list of (C, H, W), never empty.

    Shape: an input of the model is (N, C, H, W).

    Example:
        >>> import se_inject, timm, torch
        >>> se_inject.input_sizes(timm.create_model("test_resnet"))
        [(3, 160, 160)]
        >>> se_inject.input_sizes(torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3)))
        [(1, 224, 224), (1, 32, 32)]
    """
    cfg = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    said = tuple(cfg.get("input_size") or ()) if hasattr(cfg, "get") else ()
    patches = getattr(getattr(model, "patch_embed", None), "img_size", None)
    side = tuple(patches) if isinstance(patches, (tuple, list)) and len(patches) == 2 else said[1:]
    channels: list[int] = []
    for value in (getattr(model, "_model_args", {}).get("in_chans"), getattr(model, "in_chans", None), *said[:1]):
        if isinstance(value, int):
            channels.append(value)
    for m in model.modules():
        weight = m._parameters.get("weight")
        if weight is not None and weight.dim() == 4:
            channels.append(weight.shape[1] * getattr(m, "groups", 1))
            break
    sides = [side] if side else [(224, 224), (32, 32)]
    return [(c, *s) for s in sides for c in dict.fromkeys(channels or [3])]


def runs_on(model: nn.Module, size: tuple[int, ...]) -> bool:
    """Whether `model` takes an input of this (C, H, W)."""
    with on_meta(model):
        try:
            run(model, torch.empty(BATCH, *size, device="meta", dtype=dtype_of(model)))
        except TraceError:
            return False
    return True


def dtype_of(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())


class _LinspaceOnCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return func(*args, **({"device": "cpu", **kwargs} if func is torch.linspace else kwargs))


def without_values(make: Callable[[], nn.Module]) -> nn.Module:
    """A new model on the meta device; on the CPU where its constructor asks for the values of tensors.

    Older timm does, for its drop path rates, which `torch.linspace` makes: these have values in a second attempt.
    torchvision's RegNet does, for its widths.
    """
    for modes in ((), (_LinspaceOnCpu(),)):
        try:
            with entered(torch.device("meta"), MetaOps(), *modes):
                return make()
        except (NotImplementedError, RuntimeError):
            continue
    return make()


def smallest_input(model: nn.Module) -> tuple[int, ...]:
    """The smallest square (C, H, W), of sides that are usual, that the model takes; else its own size."""
    own = input_sizes(model)
    for side in (32, 64, 96, 128, 160, 192, 224, 256, 299):
        for channels in dict.fromkeys(size[0] for size in own):
            if side < own[0][1] and runs_on(model, (channels, side, side)):
                return channels, side, side
    return own[0]


def smaller_sizes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    own = input_sizes(model)[0]
    for side in (64, 96, 128):
        if side < own[1]:
            yield own[0], side, side
    yield own
