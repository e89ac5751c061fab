"""What will be done, as plain data: sites and their totals."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from .config import SEConfig

KINDS = {
    "residual": "residual", "inverted_residual": "inverted residual", "aggregation": "aggregation", "conv": "conv"}


def _range(numbers: Iterable[int]) -> str:
    found = sorted(set(numbers))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


@dataclasses.dataclass(frozen=True)
class Site:
    """One place for a block.

    Attributes:
        path: Dotted name of the block, `owner` and `slot`; what `include` and `exclude` match.
        owner: Dotted name of the module whose forward is rewritten; empty for the model itself.
        slot: Name of the block in its owner.
        kind: ``residual``, ``inverted_residual``, ``aggregation`` or ``conv``; ``unknown`` where a forward could not be traced.
        channels: Gated channels.
        layout: ``NCHW``, ``NHWC`` or ``NLC``.
        size: Positions, (H, W) or (L,), at the planned input size.
        stage: Number as in timm's ``out_indices``; the stem is 0.
        style: ``se`` (keys fc1, fc2), ``efficientnet`` (keys conv_reduce, conv_expand), or the name of another block.
        rd_channels: Squeeze width; 0 where it is left to the block.
        params: Parameters added.
        macs: Multiply-adds added for one image: the layers of the block and the scale.
        reason: Why the site is skipped; None when it gets a block.
        replaces: Names of the base's tensors that go with the attention that the block replaces.
        drawing: The unit and its block as text; see `Plan.diagram`.
    """

    path: str
    owner: str
    slot: str
    kind: str
    channels: int
    layout: str
    size: tuple[int, ...]
    stage: int
    style: str
    rd_channels: int
    params: int
    macs: int
    reason: str | None = None
    replaces: tuple[str, ...] = ()
    drawing: str = dataclasses.field(default="", repr=False, compare=False)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sites of a model under a config, injected and skipped.

    ``str(plan)`` is a table; `to_dict` has the same as JSON types. `params` and `macs` (multiply-adds
    for one image, by torch's formulas for convolutions and matrix products) are the model's before.
    """

    model: str
    config: SEConfig
    input_size: tuple[int, ...]
    params: int
    macs: int
    all_sites: tuple[Site, ...]

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites that get a block."""
        return tuple(s for s in self.all_sites if s.reason is None)

    @property
    def skipped(self) -> tuple[Site, ...]:
        """The sites that do not, each with its reason."""
        return tuple(s for s in self.all_sites if s.reason is not None)

    @property
    def added_params(self) -> int:
        return sum(s.params for s in self.sites)

    @property
    def added_macs(self) -> int:
        return sum(s.macs for s in self.sites)

    def kinds(self) -> dict[str, int]:
        """Number of injected sites by kind."""
        return dict(Counter(s.kind for s in self.sites))

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON types. A `filter_fn` is left out; its effect is in the reasons."""
        return {
            "model": self.model,
            "config": dataclasses.replace(self.config, filter_fn=None).to_dict(),
            "input_size": list(self.input_size),
            "params": self.params,
            "macs": self.macs,
            "added_params": self.added_params,
            "added_macs": self.added_macs,
            "sites": [
                {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(s).items() if k != "drawing"}
                for s in self.all_sites],
        }

    def diagram(self) -> str:
        """Where the blocks go, drawn: each kind of unit once, with the sites that it stands for.

        A unit is read from left to right, from its input x: the ways through its children, the gate with its
        channels and squeeze width, and the sum or concat in which the ways join.
        """
        groups: dict[tuple[object, ...], list[Site]] = {}
        for s in self.sites:
            alike = re.sub(r"\d+", "", s.drawing)  # of numbered siblings, one is drawn
            groups.setdefault((s.kind, s.layout, s.size, s.channels, s.rd_channels, alike), []).append(s)
        lines = [f"{self.model}, {'x'.join(map(str, self.input_size))}: {len(self.sites)} blocks"]
        for group in groups.values():
            more = f" and {len(group) - 1} more" if len(group) > 1 else ""
            place = f"{group[0].layout} {'x'.join(map(str, group[0].size))}, stage {_range(s.stage for s in group)}"
            lines += ["", f"{group[0].path}{more}: {KINDS[group[0].kind]}, {place}"]
            lines += [f"    {line}" for line in group[0].drawing.splitlines()]
        reasons = Counter(s.reason.partition(" at ")[0] for s in self.skipped if s.reason is not None)
        lines += ["", *(f"{n} skipped: {reason}" for reason, n in sorted(reasons.items()))] if reasons else []
        return "\n".join(lines)

    def __str__(self) -> str:
        head = ("site", "kind", "layout", "stage", "channels", "size", "squeeze", "params")
        rows = [
            (s.path, s.kind, s.layout, str(s.stage), str(s.channels), "x".join(map(str, s.size)),
             str(s.rd_channels), f"{s.params:,}")
            for s in self.sites
        ]
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        left = {0, 1, 2}
        lines = [
            "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip()
            for row in [head, *rows]
        ]
        for s in self.skipped:
            lines.append(f"{s.path}  skipped: {s.reason}")
        lines += [f"{s.path}  replaces {', '.join(s.replaces)}" for s in self.sites if s.replaces]
        share = self.added_params / self.params if self.params else 0.0
        lines.append(
            f"{self.model}: {len(self.sites)} sites, {len(self.skipped)} skipped; "
            f"{self.params:,} + {self.added_params:,} parameters (+{share:.1%}), "
            f"{self.macs / 1e6:,.0f} + {self.added_macs / 1e6:,.2f} M multiply-adds "
            f"at {'x'.join(map(str, self.input_size))}")
        return "\n".join(lines)
