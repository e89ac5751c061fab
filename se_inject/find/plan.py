"""The plan as plain data: sites, and their totals."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from typing import Any

from ..config import SEConfig
from ..site import KINDS, Site
from ..tables import text_table


def _range(numbers: Iterable[int]) -> str:
    found = sorted(set(numbers))
    return str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """The sites of a model under a config, injected and skipped.

    ``str(plan)`` is a table, `diagram` a drawing, and `to_dict` has the same as JSON types.

    Attributes:
        model: Name of the model.
        config: The options.
        input_size: (C, H, W) that the model was run on.
        params: Number of parameters of the model, without the blocks.
        macs: Multiply-adds of the model for one image, by torch's formulas for convolutions and matrix products.
        all_sites: The sites in the order of the run. Those with a `reason` get no block.
        ended: Where and why the run of the model ended before its end, as it asked for values of tensors. Modules that it
            calls later have no sites. None if it came to its end.

    Example:
        >>> import se_inject
        >>> made = se_inject.plan("test_resnet")
        >>> made.params, made.added_params, made.kinds()
        (469688, 9368, {'residual': 4})
        >>> print(made.sites[0].path, made.sites[0].channels)
        layer1.0.se 32
    """

    model: str
    config: SEConfig
    input_size: tuple[int, ...]
    params: int
    macs: int
    all_sites: tuple[Site, ...]
    ended: str | None = None

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
            "ended": self.ended,
            "sites": [
                {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(s).items() if k != "drawing"}
                for s in self.all_sites],
        }

    def diagram(self) -> str:
        """Where the blocks go, drawn: each kind of unit once, with the sites that it stands for.

        A unit is read from left to right, from its input x: the chains of its children, the gate with its
        channels and squeeze width, and the sum or concat in which the chains join.
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
        lines = [text_table(head, rows, left=("site", "kind", "layout"))]
        for s in self.skipped:
            lines.append(f"{s.path}  skipped: {s.reason}")
        lines += [f"{s.path}  replaces {', '.join(s.replaces)}" for s in self.sites if s.replaces]
        share = self.added_params / self.params if self.params else 0.0
        lines.append(
            f"{self.model}: {len(self.sites)} sites, {len(self.skipped)} skipped; "
            f"{self.params:,} + {self.added_params:,} parameters (+{share:.1%}), "
            f"{self.macs / 1e6:,.0f} + {self.added_macs / 1e6:,.2f} M multiply-adds "
            f"at {'x'.join(map(str, self.input_size))}")
        if self.ended is not None:
            lines.append(f"{self.ended}: modules that are called later were not looked at")
        return "\n".join(lines)


def without_match(config: SEConfig, sites: Collection[Site]) -> list[tuple[str, str]]:
    """The globs of `config` that match no site, each after the name of its option."""
    globs = [("include", p) for p in config.include or ()] + [("exclude", p) for p in config.exclude or ()]
    return [(option, p) for option, p in globs if not any(fnmatchcase(s.path, p) for s in sites)]


def rejected(config: SEConfig, site: Site) -> str | None:
    """Why the filters of `config` leave `site` out; None if they keep it."""
    if config.stages is not None and site.stage not in config.stages:
        return f"stage {site.stage} is not in stages={list(config.stages)}"
    if config.include is not None and not any(fnmatchcase(site.path, p) for p in config.include):
        return "no include pattern matches"
    if config.exclude is not None and any(fnmatchcase(site.path, p) for p in config.exclude):
        return "an exclude pattern matches"
    if site.channels < config.min_channels:
        return f"{site.channels} channels are below min_channels={config.min_channels}"
    if config.filter_fn is not None and not config.filter_fn(site):
        return "filter_fn said no"
    return None
