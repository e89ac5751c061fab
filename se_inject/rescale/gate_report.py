"""What `gates` found, as plain data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch

from ..tables import text_table


@dataclasses.dataclass(frozen=True, eq=False)
class SiteGates:
    """The gate of one block over all images. All tensors are in double precision on the CPU.

    Attributes:
        path: Dotted name of the block.
        stage: Number of the stage, as in timm's ``out_indices``.
        mean: The mean over the images (C,).
        deviation: The standard deviation over the images (C,).
        class_means: The mean over the images of each class (K, C), in the order of `GateReport.classes`.
        variation: How much the gate varies from image to image, see `FoldedSite.variation`; of a block with a
            shift how much that varies, if `fold` can take it and it varies more.
        kept: Why `fold` would keep the block; None if it can fold it. Whether another method than `forward` would lose the
            gate is known to `fold` alone.
    """

    path: str
    stage: int
    mean: torch.Tensor
    deviation: torch.Tensor
    class_means: torch.Tensor
    variation: float
    kept: str | None

    @property
    def class_deviation(self) -> torch.Tensor | None:
        """The standard deviation of the means of the classes (C,); None if there are fewer than two."""
        return self.class_means.std(0, correction=0) if len(self.class_means) > 1 else None

    def folds(self, max_variation: float = math.inf) -> bool:
        """Whether ``fold(model, loader, max_variation=...)`` takes the block on the same images, but for what `kept` says."""
        return self.kept is None and self.variation <= max_variation


@dataclasses.dataclass(frozen=True, eq=False)
class GateReport:
    """The gates of a model over images. ``str(report)`` is a table.

    The table has a row for each site: the mean gate over images and channels, the least and the greatest mean of a channel,
    the standard deviation over the images and over the means of the classes (both averaged over the channels), and whether
    `fold` can replace the gate by its mean.

    Attributes:
        sites: Those whose block multiplies its input by one factor for each image and channel, in the order of the sites.
        left_out: The other blocks, each with the reason.
        images: How many images there were.
        classes: The classes, by name or number, in order; empty if the loader gave images alone.
        class_images: How many images of each class there were.

    Example:
        >>> import se_inject, timm, torch
        >>> model = se_inject.inject(timm.create_model("test_resnet"), stages=1)
        >>> print(se_inject.gates(model, [(torch.randn(4, 3, 160, 160), torch.tensor([0, 1, 0, 1]))]))
        site         channels  mean gate   least  greatest  sd images  sd classes  fold
        layer1.0.se        32     1.0000  1.0000    1.0000     0.0000      0.0000  takes it
        the gates of 1 block on 4 images of 2 classes
    """

    sites: tuple[SiteGates, ...]
    left_out: Mapping[str, str]
    images: int
    classes: tuple[int | str, ...] = ()
    class_images: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON types: the fields, with tensors as lists."""
        def site(s: SiteGates) -> dict[str, Any]:
            values = {f.name: getattr(s, f.name) for f in dataclasses.fields(s)}
            return {name: v.tolist() if isinstance(v, torch.Tensor) else v for name, v in values.items()}

        return {
            "sites": [site(s) for s in self.sites], "left_out": dict(self.left_out), "images": self.images,
            "classes": list(self.classes), "class_images": list(self.class_images)}  # fmt: skip

    def __str__(self) -> str:
        head = ("site", "channels", "mean gate", "least", "greatest", "sd images", "sd classes", "fold")
        rows = []
        for s in self.sites:
            values = (s.mean.mean(), s.mean.min(), s.mean.max(), s.deviation.mean())
            over_classes = "-" if s.class_deviation is None else f"{float(s.class_deviation.mean()):.4f}"
            rows.append((
                s.path, str(len(s.mean)), *(f"{float(v):.4f}" for v in values), over_classes,
                "takes it" if s.folds() else f"keeps it: {s.kept}"))
        lines = [text_table(head, rows, left=("site", "fold"))] if rows else []
        lines += [f"left out: {path}: {reason}" for path, reason in self.left_out.items()]
        return "\n".join((*lines, self.summary))

    @property
    def summary(self) -> str:
        """What was read, in a line."""
        of = f" of {_count(len(self.classes), 'class', 'classes')}" if self.classes else ""
        return f"the gates of {_count(len(self.sites), 'block')} on {_count(self.images, 'image')}{of}"


def _count(n: int, one: str, many: str | None = None) -> str:
    return f"{n:,} {one if n == 1 else many or f'{one}s'}"
