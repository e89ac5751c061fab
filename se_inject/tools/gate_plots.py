"""Figures of a `GateReport` by matplotlib: the mean gate by channel, and how much the gates of all sites vary."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Sequence
from typing import Any

from ..config import did_you_mean
from ..errors import ConfigError, SEInjectError
from ..rescale.gate_report import GateReport, SiteGates

DRAWN = 4  # classes, as in the paper
CHANNELS = 50  # points of a line, as in the paper
ALL = "#000000"
COLORS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9")  # Okabe and Ito's, told apart by the color-blind
MARKERS = ("o", "s", "^", "D", "v", "P")
TAKEN, KEPT = COLORS[0], COLORS[3]
_STYLE = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans", "Arial", "Helvetica"], "font.size": 8, "axes.titlesize": 8,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6, "lines.linewidth": 1.0, "svg.fonttype": "none",
    "axes.edgecolor": "#555555", "xtick.color": "#333333", "ytick.color": "#333333", "svg.hashsalt": "se_inject"}
_Y = "mean gate (1 = unchanged)"


def matplotlib() -> Any:
    """The library.

    Raises:
        SEInjectError: It is not installed.
    """
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError as error:
        raise SEInjectError(f"figures need matplotlib ({error}): pip install 'se-inject[plots]'") from error
    return matplotlib


@dataclasses.dataclass(frozen=True)
class Line:
    """A class as it is drawn: the number of its row in `SiteGates.class_means`, its name, color and marker."""

    row: int
    name: str
    color: str
    marker: str


def lines(classes: Sequence[int | str], names: Sequence[str] = ()) -> tuple[Line, ...]:
    """Which of the classes of a report are drawn: those of these names, or the first few.

    Raises:
        ConfigError: There is no such class, or there are more than colors.
    """
    known = [str(c) for c in classes]
    for name in names:
        if name not in known:
            there = f"the classes are {', '.join(known)}" if known else "the images have no classes"
            raise ConfigError(f"classes: there is no class {name!r}{did_you_mean(name, known)}; {there}")
    chosen = list(dict.fromkeys(names)) or known[:DRAWN]
    if len(chosen) > len(COLORS):
        raise ConfigError(f"classes: {len(chosen)} are too many for one figure: choose at most {len(COLORS)}")
    return tuple(Line(known.index(name), name, COLORS[i], MARKERS[i]) for i, name in enumerate(chosen))


def early_middle_last(report: GateReport) -> list[SiteGates]:
    """The sites whose gates vary most in the first, the middle and the last stage; without three stages, in thirds of the
    sites."""
    stages: dict[int, list[SiteGates]] = {}
    for s in report.sites:
        stages.setdefault(s.stage, []).append(s)
    groups = [stages[n] for n in sorted(stages)]
    if len(groups) < 3:
        n = len(report.sites)
        thirds = (report.sites[n * i // 3:n * (i + 1) // 3] for i in range(3))
        groups = [list(g) for g in thirds if g]
    chosen = sorted({0, len(groups) // 2, len(groups) - 1}) if groups else []
    return [max(groups[i], key=lambda s: s.variation) for i in chosen]


def limits(report: GateReport, drawn: Sequence[Line]) -> tuple[float, float]:
    """The range of gates that the panels have in common."""
    low, high = 1.0, 1.0
    for s in early_middle_last(report):
        values = [s.mean - s.deviation, s.mean + s.deviation, *(s.class_means[line.row] for line in drawn)]
        low, high = min(low, *(float(v.min()) for v in values)), max(high, *(float(v.max()) for v in values))
    margin = max(0.02, 0.05 * (high - low))
    return low - margin, high + margin


def channels_of(site: SiteGates) -> list[int]:
    """The channels that are drawn: all, or some at equal distances."""
    count = len(site.mean)
    n = min(count, CHANNELS)
    return [round(i * (count - 1) / max(1, n - 1)) for i in range(n)]


def place(site: SiteGates) -> str:
    """Where a site is, for a title."""
    return f"{site.path} (stage {site.stage})" if site.stage >= 0 else site.path


def _mark(line: Line) -> dict[str, Any]:
    return {"marker": line.marker, "markersize": 5.4 - 0.75 * COLORS.index(line.color), "mfc": "none", "mew": 0.9}


def _draw_panel(ax: Any, site: SiteGates, drawn: Sequence[Line], y: tuple[float, float]) -> None:
    at = channels_of(site)
    mean, deviation = site.mean[at], site.deviation[at]
    ax.axhline(1, color="#999999", linewidth=0.6, linestyle=(0, (4, 3)))
    ax.fill_between(at, (mean - deviation).tolist(), (mean + deviation).tolist(), color="#000000", alpha=0.12, linewidth=0)
    ax.plot(at, mean.tolist(), color=ALL, linewidth=1.2, zorder=3)  # in front, where a class has its values
    for line in drawn:  # the marks get smaller, so that equal values are seen
        ax.plot(at, site.class_means[line.row][at].tolist(), color=line.color, linewidth=0.7, **_mark(line))
    ax.set_ylim(*y)
    ax.margins(x=0.02)
    ax.locator_params(axis="x", nbins=5, integer=True)
    ax.set_title(place(site), loc="left")
    count = len(site.mean)
    ax.set_xlabel(f"channel ({len(at)} of {count})" if len(at) < count else f"channel (all {count})")


def panel(report: GateReport, site: SiteGates, drawn: Sequence[Line]) -> str:
    """The mean gate by channel at one site, as an SVG element whose text is text."""
    mpl = matplotlib()
    with mpl.rc_context({**_STYLE, "font.size": 10, "axes.titlesize": 10}):
        figure = mpl.figure.Figure(figsize=(4.0, 3.2))
        ax = figure.add_axes((0.155, 0.15, 0.79, 0.75))  # the same in all panels, so that they are aligned
        _draw_panel(ax, site, drawn, limits(report, drawn))
        ax.set_ylabel(_Y)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None}, transparent=True)
    svg = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg[svg.index("<svg"):], flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{site.path}-", svg)  # ids are those of the whole page
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'role="img"', svg, count=1)


def write(report: GateReport, drawn: Sequence[Line], max_variation: float, path: str) -> None:
    """Write the figure for a paper: the panels, and below them the variation of all sites.

    Args:
        report: What `gates` found.
        drawn: The classes to draw, see `lines`.
        max_variation: The gates up to here are marked as those that `fold` takes.
        path: A file of a format that matplotlib writes.
    """
    mpl = matplotlib()
    shown = early_middle_last(report)
    with mpl.rc_context(_STYLE):
        figure = mpl.figure.Figure(figsize=(7.2, 5.2), layout="constrained")
        grid = figure.add_gridspec(2, len(shown), height_ratios=(1.25, 1))
        axes = [figure.add_subplot(grid[0, i]) for i in range(len(shown))]
        for ax, site in zip(axes, shown):
            _draw_panel(ax, site, drawn, limits(report, drawn))
            ax.tick_params(labelleft=ax is axes[0])
        axes[0].set_ylabel(_Y)
        _legend(mpl, figure, drawn)
        _draw_strip(mpl, figure.add_subplot(grid[1, :]), report, max_variation)
        figure.savefig(path, dpi=300, metadata={"Date": None} if path.endswith(".svg") else None)


def _legend(mpl: Any, figure: Any, drawn: Sequence[Line]) -> None:
    """Above the panels; names are set afterwards, as matplotlib leaves out labels that begin with an underscore."""
    line = mpl.lines.Line2D
    handles = [line([], [], color=c.color, **_mark(c)) for c in drawn]
    handles += [line([], [], color=ALL, linewidth=1.4), mpl.patches.Patch(color="#000000", alpha=0.12, linewidth=0)]
    legend = figure.legend(handles, ["-"] * len(handles), loc="outside upper left", ncols=3, frameon=False)
    for text, name in zip(legend.get_texts(), [*(c.name for c in drawn), "all images", "± 1 sd over all images"]):
        text.set_parse_math(False)
        text.set_text(name)


def _draw_strip(mpl: Any, ax: Any, report: GateReport, max_variation: float) -> None:
    for i, s in enumerate(report.sites):
        taken = s.folds(max_variation)
        color = TAKEN if taken else KEPT
        ax.vlines(i, 0, 100 * s.variation, color=color, linewidth=1)
        ax.plot([i], [100 * s.variation], "o", color=color, markersize=4,
                markerfacecolor=color if taken else "white")
    ax.axhline(100 * max_variation, color="#555555", linewidth=0.8, linestyle=(0, (4, 3)))
    ax.set_xticks(range(len(report.sites)), [s.path for s in report.sites], rotation=45, ha="right", rotation_mode="anchor",
                  fontsize=7 if len(report.sites) <= 32 else 4)
    ax.set_ylim(0, 108 * max([max_variation, *(s.variation for s in report.sites)]) or 1)
    ax.set_ylabel("sd over images (% of mean)")
    line = mpl.lines.Line2D
    ax.legend(
        [line([], [], color=TAKEN, marker="o", markersize=4), line([], [], color=KEPT, marker="o", markersize=4, mfc="white"),
         line([], [], color="#555555", linewidth=0.8, linestyle=(0, (4, 3)))],
        ["becomes a constant", "stays a block", f"limit of {max_variation:.3g}"],
        loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, borderaxespad=0)
