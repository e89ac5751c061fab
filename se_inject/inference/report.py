"""What `optimize_for_inference` did, as plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class OptimizedBlock:
    """What became of one block.

    Attributes:
        path: Dotted name of the block.
        source: What its squeeze is taken of; None where the block was left as it is.
        channels: Channels of that, where the squeeze was moved upstream; None where it stayed at the block's input.
        reason: Why it was not moved; None where it was.
    """

    path: str
    source: str | None
    channels: int | None
    reason: str | None

    @property
    def moved(self) -> bool:
        return self.reason is None


@dataclasses.dataclass(frozen=True)
class OptimizedModel:
    """What was done to a model. ``str(report)`` is a table.

    Attributes:
        blocks: The blocks, in the order in which they are called.
        norms_folded: Paths of the batch norms that were folded, each with the layer that took it in.
        norms_kept: Paths of those that were not, with the reason.
        sums: Number of sums that are done in place, or in one pass with a scale.
        kept: Paths of the modules with sums that were left as they are, with the reason.
    """

    blocks: tuple[OptimizedBlock, ...]
    norms_folded: Mapping[str, str]
    norms_kept: Mapping[str, str]
    sums: int
    kept: Mapping[str, str]

    def summary(self) -> str:
        moved = sum(b.moved for b in self.blocks)
        return (f"{moved} of {len(self.blocks)} squeezes moved upstream, {len(self.norms_folded)} of "
                f"{len(self.norms_folded) + len(self.norms_kept)} batch norms folded, {self.sums} sums in place")

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        return {
            "blocks": [dataclasses.asdict(b) for b in self.blocks], "norms_folded": dict(self.norms_folded),
            "norms_kept": dict(self.norms_kept), "sums": self.sums, "kept": dict(self.kept)}

    def __str__(self) -> str:
        rows = [(b.path, f"squeezes {b.source}, {b.channels} channels" if b.moved else
                 f"{'left as it is' if b.source is None else 'squeeze not moved'}: {b.reason}") for b in self.blocks]
        rows += [(path, f"norm not folded: {reason}") for path, reason in self.norms_kept.items()]
        rows += [(path or "the model", f"sums not in place: {reason}") for path, reason in self.kept.items()]
        width = max((len(r[0]) for r in rows), default=0)
        return "\n".join([*(f"{path.ljust(width)}  {text}" for path, text in rows), self.summary()])


OptimisedModel = OptimizedModel  # its name before 0.2
