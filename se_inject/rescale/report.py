"""What `fold` did, as plain data."""

from __future__ import annotations

import dataclasses
import math

from ..tables import text_table


@dataclasses.dataclass(frozen=True)
class FoldedSite:
    """What `fold` found at one block.

    Attributes:
        path: Dotted name of the block.
        gate: The mean of its gate over images and channels; NaN if the block is not its input times a gate for each channel.
        variation: How much the gate varies from image to image: the standard deviation over the images, relative to the
            absolute value of the mean, averaged over the channels; NaN if there is no such gate. Of a block with a shift that
            of the shift, if it is larger: relative to the mean over channels of the shift's absolute value.
        reason: Why the block was kept; None if it was folded.
        into: Names of the tensors that took the mean gate in; empty if the block was kept.
    """

    path: str
    gate: float
    variation: float
    reason: str | None = None
    into: tuple[str, ...] = ()

    @property
    def folded(self) -> bool:
        """Whether the block was folded."""
        return self.reason is None


@dataclasses.dataclass(frozen=True)
class FoldReport:
    """What `fold` did. ``str(report)`` is a table.

    Attributes:
        sites: All blocks that the model had, in the order of its sites.
        images: How many images the gates and the outputs were computed on.
        change: How much the outputs changed: the root mean square of the difference, relative to that of the outputs before.
        agreement: The share of images whose largest output is the same as before; None unless the output is (N, classes).

    Example:
        >>> import se_inject, timm, torch
        >>> model = se_inject.inject(timm.create_model("test_resnet"), stages=1)
        >>> report = se_inject.fold(model, [torch.randn(4, 3, 160, 160)])
        >>> print(report)
        site         mean gate  variation  result
        layer1.0.se     1.0000     0.0000  folded into layer1.0.bn2.weight, layer1.0.bn2.bias
        1 of 1 blocks folded; on 4 images the outputs changed by 0 (relative RMS), top-1 as before for 100.00%
    """

    sites: tuple[FoldedSite, ...]
    images: int
    change: float
    agreement: float | None

    @property
    def folded(self) -> tuple[FoldedSite, ...]:
        """The blocks that were folded."""
        return tuple(s for s in self.sites if s.folded)

    @property
    def kept(self) -> tuple[FoldedSite, ...]:
        """The blocks that were kept."""
        return tuple(s for s in self.sites if not s.folded)

    def __str__(self) -> str:
        head = ("site", "mean gate", "variation", "result")
        rows = [
            (s.path, _number(s.gate), _number(s.variation),
             f"folded into {', '.join(s.into)}" if s.folded else f"kept: {s.reason}")
            for s in self.sites]
        agreement = "" if self.agreement is None else f", top-1 as before for {self.agreement:.2%}"
        return (
            f"{text_table(head, rows, left=('site', 'result'))}\n"
            f"{len(self.folded)} of {len(self.sites)} blocks folded; on {self.images} images the outputs changed by "
            f"{self.change:.3g} (relative RMS){agreement}")


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"
