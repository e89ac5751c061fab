"""What `optimize_for_inference` did, as plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class OptimizedBlock:
    """What was done to one block.

    Attributes:
        path: Dotted name of the block.
        source: What its squeeze is taken of; None where the block stays as it is.
        channels: Channels of `source`, where the squeeze was moved upstream; None where it stays at the block's input.
        reason: Why it was not moved; None where it was.
    """

    path: str
    source: str | None
    channels: int | None
    reason: str | None

    @property
    def moved(self) -> bool:
        """Whether its squeeze is taken of a tensor upstream."""
        return self.reason is None


@dataclasses.dataclass(frozen=True)
class OptimizedModel:
    """What was done to a model. ``str(report)`` has a line for each block, and for each norm and module that stays as it is.

    Attributes:
        blocks: The blocks, in the order of their calls.
        norms_folded: Paths of the folded batch norms, each with the path of the layer that it was folded into.
        norms_kept: Paths of the other batch norms, each with the reason.
        sums: The number of sums in place, or in one pass with a scaling.
        kept: Paths of the modules with sums that stay as they are, each with the reason.

    Example:
        >>> import se_inject, timm
        >>> model = se_inject.inject(timm.create_model("test_resnet"), stages=(3, 4))
        >>> report = se_inject.optimize_for_inference(model).se_report
        >>> print(report)
        layer3.0.se  squeezes layer3.0.act2, 48 channels
        layer4.0.se  squeeze not moved: conv2d in layer4.0.conv2 is not linear over channels alone
        1 of 2 squeezes moved upstream, 15 of 15 batch norms folded, 4 sums in place
        >>> sorted(report.to_dict())
        ['blocks', 'kept', 'norms_folded', 'norms_kept', 'sums']
    """

    blocks: tuple[OptimizedBlock, ...]
    norms_folded: Mapping[str, str]
    norms_kept: Mapping[str, str]
    sums: int
    kept: Mapping[str, str]

    def summary(self) -> str:
        """The counts, in one line."""
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


OptimisedModel = OptimizedModel  # kept as an alias
