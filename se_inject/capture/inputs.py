"""What a model takes: its input sizes, and a recorded run on one of them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..errors import TraceError
from ..private import ConvNd
from ..undo import entered
from .calls import Run
from .example import Example, Inputs
from .known_values import KnownValues
from .meta_ops import MetaOps
from .recording import record, run
from .snapshot import on_meta


def record_model(model: nn.Module, inputs: Inputs = None) -> Run:
    """The recorded run of a model on these inputs, or on images of the likeliest size that it takes.

    Where the model asks for values of tensors, it is run once more with those that are known, as they do not depend on the
    inputs. If it still cannot be run to its end, the calls before count: see `Run.ended`.

    Use it inside `on_meta`.

    Raises:
        TraceError: The model does not take the inputs; without `inputs`, the error is that of the likeliest.
    """
    examples = _examples(model, inputs)
    runs = []
    for example in examples:
        runs.append(record(model, example, MetaOps(factories=True)))
        if runs[-1].error is None:
            return runs[-1]
    first = runs[-1 if isinstance(inputs, Example) else 0]
    if _asks_for_values(first):
        with_values = [record(model, example, KnownValues()) for example in examples]
        for found in with_values:
            if found.error is None:
                return found
        found = with_values[runs.index(first)]
        if _asks_for_values(found) and any(call.end >= 0 for call in found.root.walk()):
            return found
    assert first.error is not None
    raise first.error


def _asks_for_values(found: Run) -> bool:
    """Whether a run ended where an operator or Python needs the values of a tensor on the meta device."""
    cause = found.error.__cause__ if found.error is not None else None
    return isinstance(cause, (NotImplementedError, RuntimeError, TypeError)) and (
        re.search(r"(?<![a-z])meta(?![a-z])", str(cause), re.IGNORECASE) is not None)


def _examples(model: nn.Module, inputs: Inputs) -> list[Example]:
    if isinstance(inputs, Example):
        return list(dict.fromkeys([inputs.enlarged(), inputs]))
    sizes = input_sizes(model) if inputs is None else [inputs]
    dtypes = dict.fromkeys([dtype_of(model), *(p.dtype for p in model.parameters() if p.is_floating_point())])
    return [Example.images(size, dtype) for size, dtype in itertools.product(sizes, dtypes)]


def input_sizes(model: nn.Module) -> list[tuple[int, ...]]:
    """Return the input sizes that a model may take, likeliest first. Runs nothing, and changes nothing.

    A timm model has its own size, also inside another model. So have models whose configuration has an image size, as those
    of transformers, torchvision and open_clip. For other models, the first convolution gives the channels, and the size is
    that of ImageNet or CIFAR; for convolutions over one or three axes, it is a usual one.

    Args:
        model: A model.

    Returns:
        A list of (C, H, W), never empty; of (C, L) for signals, and of (C, D, H, W) for volumes.

    Shape: an input of the model is (N, C, H, W), (N, C, L) or (N, C, D, H, W).

    Example:
        >>> import se_inject, timm, torch
        >>> se_inject.input_sizes(timm.create_model("test_resnet"))
        [(3, 160, 160)]
        >>> se_inject.input_sizes(torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3)))
        [(1, 224, 224), (1, 32, 32)]
    """
    channels, side = next(filter(None, map(_said, model.modules())), ([], ()))
    rank = 2
    conv = next((m for m in model.modules() if isinstance(m, ConvNd)), None)
    if conv is not None:
        rank = len(conv.kernel_size)
        channels = [*channels, conv.in_channels]
    else:  # a layer of the author's own
        weights = (m._parameters.get("weight") for m in model.modules())
        channels += [w.shape[1] for w in weights if w is not None and w.dim() == 4][:1]
    sides = [side] if side and rank == 2 else _USUAL[rank]
    return [(c, *s) for s in sides for c in dict.fromkeys(channels or [3])]


# of signals, of images as in ImageNet and CIFAR, of volumes and clips
_USUAL: dict[int, list[tuple[int, ...]]] = {
    1: [(1024,), (256,)], 2: [(224, 224), (32, 32)], 3: [(64, 64, 64), (16, 112, 112), (32, 32, 32)]}


def _said(m: nn.Module) -> tuple[list[int], tuple[int, ...]] | None:
    """The channels and the (H, W) that a module is made for, as timm, transformers, torchvision and open_clip write them."""
    cfg = getattr(m, "pretrained_cfg", None) or getattr(m, "default_cfg", None)
    if isinstance(cfg, Mapping) and cfg.get("input_size"):
        said = tuple(cfg["input_size"])
        patches = _sides(getattr(getattr(m, "patch_embed", None), "img_size", None))
        values = (getattr(m, "_model_args", {}).get("in_chans"), getattr(m, "in_chans", None), said[0])
        return [v for v in values if isinstance(v, int)], patches or said[1:]
    config = getattr(m, "config", None)
    for source in (getattr(config, "vision_config", None), config, m):
        if side := _sides(getattr(source, "image_size", None)):
            channels = getattr(source, "num_channels", None)
            return [channels] if isinstance(channels, int) else [], side
    return None


def _sides(value: Any) -> tuple[int, ...]:
    """(H, W) from a number or a pair of numbers; empty for anything else."""
    if type(value) is int and value > 0:
        return value, value
    pair = isinstance(value, (tuple, list)) and len(value) == 2 and all(type(n) is int for n in value)
    return tuple(value) if pair else ()


def runs_on(model: nn.Module, size: tuple[int, ...]) -> bool:
    """Whether `model` takes an input of this (C, H, W)."""
    with on_meta(model):
        try:
            run(model, Example.images(size, dtype_of(model)), MetaOps(factories=True))
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
