"""Pictures in a folder, as a model takes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from ..capture.inputs import input_sizes
from ..errors import SEInjectError


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """The pictures of a folder.

    Attributes:
        images: Pairs of a picture, prepared for the model, and the number of its class.
        numbers: The number of the class of each picture.
        classes: The names of the classes: the subfolders; empty if the pictures are in the folder itself.
        mean: The mean by which the pictures are normalized.
        std: Likewise, the standard deviation.
    """

    images: Any
    numbers: Sequence[int]
    classes: tuple[str, ...]
    mean: Sequence[float]
    std: Sequence[float]

    def __len__(self) -> int:
        return len(self.images)

    def loader(self, batch_size: int) -> Any:
        """Batches of images and labels, or of images alone where there are no classes."""
        loader = DataLoader(self.images, batch_size=batch_size)
        return loader if self.classes else ((images,) for images, _ in loader)

    def first(self, name: str | None) -> torch.Tensor:
        """The first picture of a class; without a name, the first of all."""
        image: torch.Tensor = self.images[0 if name is None else self.numbers.index(self.classes.index(name))][0]
        return image

    def as_seen(self, image: torch.Tensor) -> torch.Tensor:
        """A prepared picture with the colors that it had: (3, H, W) from 0 to 1."""
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (image * std + mean).clamp(0, 1)


def open_folder(folder: str, model: nn.Module, size: tuple[int, ...] | None = None, limit: int | None = None) -> ImageFolder:
    """The pictures of a folder, through timm's dataset and the transform of the model's data config.

    Args:
        folder: Its subfolders are the classes; without any, there are no classes.
        model: The model that will take the pictures.
        size: Their (C, H, W); None is the model's own.
        limit: The greatest number of pictures; they are taken at equal distances. None takes all.

    Raises:
        SEInjectError: There is no such folder, or no picture in it, or the model does not take pictures in color.
    """
    from timm.data import create_dataset, create_transform, resolve_model_data_config

    if not Path(folder).is_dir():
        raise SEInjectError(f"there is no folder {folder!r}: give one with pictures, or with a subfolder for each class")
    config = resolve_model_data_config(model, {} if size is None else {"input_size": size})
    channels = input_sizes(model)[0][0]
    if channels != 3:
        raise SEInjectError(
            f"the model takes images of {channels} channel{'s' * (channels > 1)}, and pictures have 3: "
            "call se_inject.gates(model, loader) with a loader of your own")
    try:
        found: Any = create_dataset("", folder, search_split=False, transform=create_transform(**config, is_training=False))
    except RuntimeError as error:
        raise SEInjectError(f"there are no pictures in {folder!r}: {error}") from error
    by_name = found.reader.class_to_idx
    classes = tuple(name or Path(folder).resolve().name for name in sorted(by_name, key=by_name.__getitem__))
    numbers = [number for _, number in found.reader.samples]
    if limit is not None and limit < len(numbers):
        chosen = [i * len(numbers) // limit for i in range(limit)]
        found, numbers = Subset(found, chosen), [numbers[i] for i in chosen]
    return ImageFolder(found, numbers, classes if set(by_name) != {""} else (), config["mean"], config["std"])
