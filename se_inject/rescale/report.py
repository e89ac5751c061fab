"""What `fold` did, as plain data."""

from __future__ import annotations

import dataclasses

from ..tables import text_table


@dataclasses.dataclass(frozen=True)
class FoldedSite:
    """What `fold` found at one block.

    Attributes:
        path: Dotted name of the block.
        gate: The mean of its gate over images and channels; NaN where it has no gate for each channel.
        variation: How much the gate varies from image to image: each channel's standard deviation over the images,
            relative to the absolute value of its mean, averaged over the channels; NaN where there is no such gate.
        reason: Why the block was kept; None where it was folded.
        into: Names of the tensors that its mean gate was multiplied into.
    """

    path: str
    gate: float
    variation: float
    reason: str | None = None
    into: tuple[str, ...] = ()

    @property
    def folded(self) -> bool:
        return self.reason is None


@dataclasses.dataclass(frozen=True)
class FoldReport:
    """What `fold` did. ``str(report)`` is a table.

    Attributes:
        sites: All blocks of the model, in the order of its sites.
        images: How many images the gates and the outputs were computed on.
        change: Relative root mean square of the change in outputs: that of the difference over that of the outputs before.
        agreement: Share of images whose highest output is the same as before, where outputs are (N, classes); else None.
    """

    sites: tuple[FoldedSite, ...]
    images: int
    change: float
    agreement: float | None

    @property
    def folded(self) -> tuple[FoldedSite, ...]:
        return tuple(s for s in self.sites if s.folded)

    @property
    def kept(self) -> tuple[FoldedSite, ...]:
        return tuple(s for s in self.sites if not s.folded)

    def __str__(self) -> str:
        head = ("site", "mean gate", "variation", "result")
        rows = [(s.path, f"{s.gate:.4f}", f"{s.variation:.4f}", f"folded into {', '.join(s.into)}" if s.folded
                 else f"kept: {s.reason}") for s in self.sites]
        lines = [text_table(head, rows, left=("site", "result"))]
        agreement = "" if self.agreement is None else f", top-1 as before for {self.agreement:.2%}"
        lines.append(f"{len(self.folded)} of {len(self.sites)} blocks folded; on {self.images} images the outputs changed by "
                     f"{self.change:.3g} (relative RMS){agreement}")
        return "\n".join(lines)
