"""Batches of images or of other inputs, from what a user's loader gives."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from ..capture.example import Example, Inputs
from ..capture.inputs import input_sizes
from ..errors import SEInjectError


class Batch(NamedTuple):
    """The arguments of the model, on its device, and the batch as the loader gave it."""

    arguments: Example
    given: Any


def batches(what: str, loader: Iterable[Any], model: nn.Module, inputs: Inputs) -> Iterator[Batch]:
    """The batches of a loader, without those that are empty.

    Args:
        what: The name of the function that asks, for messages.
        loader: Batches of images, or of what `inputs` says.
        model: The model that is to run on them.
        inputs: What the model takes.

    Raises:
        SEInjectError: The loader gives something else.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    dims = 1 + len(input_sizes(model)[0])
    try:
        given = iter(loader)
    except TypeError as error:
        raise SEInjectError(
            f"{what}: the loader is a {type(loader).__name__}: pass a DataLoader or a list of batches") from error
    for batch in given:
        found = _arguments(what, batch, inputs) if isinstance(inputs, Example) else _images(what, batch, dims)
        if all(t.dim() == 0 or len(t) for t in found.tensors):
            yield Batch(found.to(device), batch)


def first_of(what: str, model: nn.Module, found: Iterator[Batch]) -> Batch:
    """The first batch.

    Raises:
        SEInjectError: There is none.
    """
    first = next(found, None)
    if first is None:
        name = type(model).__name__
        raise SEInjectError(f"{what}({name}, loader): the loader gave no batch; it must give image tensors (N, C, H, W)")
    return first


def run(what: str, model: nn.Module, batch: Example, method: str = "forward") -> Any:
    """What a model, or another method of it, returns for a batch.

    Raises:
        SEInjectError: It raises an error.
    """
    try:
        return batch.run(model if method == "forward" else getattr(model, method))
    except MemoryError:
        raise
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        raise SEInjectError(
            f"{what}({type(model).__name__}): the model does not take the batch of {batch}: {type(error).__name__}: {error}; "
            "the model was not changed") from error


def _images(what: str, batch: Any, dims: int) -> Example:
    images = batch[0] if isinstance(batch, (list, tuple)) and batch else batch
    if not isinstance(images, torch.Tensor) or images.dim() != dims or not images.is_floating_point():
        raise SEInjectError(
            f"{what}: the loader gave {_described(images)}; it must give batches of floating-point images (N, C, H, W), or "
            "tuples with the images first; for a model that takes other inputs, pass example_inputs=")
    return Example((images,))


def _arguments(what: str, batch: Any, inputs: Example) -> Example:
    """Of a batch the arguments that `inputs` has: by name, or the first ones."""
    given = tuple(batch) if isinstance(batch, (list, tuple)) else (batch,)
    if inputs.kwargs:
        if isinstance(batch, Mapping) and inputs.kwargs.keys() <= batch.keys():
            return Example.of({name: batch[name] for name in inputs.kwargs}, on_meta=False)
    elif len(given) >= len(inputs.args):
        return Example.of(given[:len(inputs.args)], on_meta=False)
    raise SEInjectError(
        f"{what}: the loader gave a {type(batch).__name__}, and the model was given {inputs}: it must give batches of such "
        "arguments, a tuple or a dict of them")


def labels_of(what: str, batch: Batch, inputs: Inputs) -> list[Hashable] | None:
    """The class of each image, a number or a name; None if the batch has no labels.

    They stand behind the arguments of the model, or have the name ``labels`` in a dict.

    Raises:
        SEInjectError: What stands there is something else.
    """
    given: Any = None
    if isinstance(batch.given, Mapping):
        if "labels" not in batch.arguments.kwargs:
            given = batch.given.get("labels")
    elif isinstance(batch.given, (list, tuple)):
        given = next(iter(batch.given[len(inputs.args) if isinstance(inputs, Example) else 1:]), None)
    if given is None:
        return None
    labels = given
    if isinstance(given, torch.Tensor):
        numbers = given.dim() == 1 and not (given.is_floating_point() or given.is_complex() or given.dtype is torch.bool)
        labels = given.tolist() if numbers else None
    images = batch.arguments.batch
    if isinstance(labels, (list, tuple)) and len(labels) == images and all(type(label) in (int, str) for label in labels):
        return list(labels)
    raise SEInjectError(
        f"{what}: the loader gave {_described(given)} as labels of {images} images; it must give one class number or name for "
        "each image, or images alone")


def _described(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of {tuple(value.shape)} and {value.dtype}"
    return f"a {type(value).__name__}"
