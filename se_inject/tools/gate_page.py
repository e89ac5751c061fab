"""One page that shows a `GateReport`: HTML that needs no other file."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Iterable, Sequence
from html import escape
from importlib.metadata import version

import torch

from ..rescale.gate_report import GateReport, SiteGates
from .channel_maps import ChannelMap, StrongestChannels
from .gate_plots import ALL, KEPT, TAKEN, Line, channels_of, early_middle_last, matplotlib, panel

_MARKS = {  # matplotlib's markers
    "o": '<circle cx="16" cy="6" r="3.2"/>', "s": '<path d="M13 3h6v6h-6z"/>', "^": '<path d="M16 2l4 7h-8z"/>',
    "D": '<path d="M16 2l4 4-4 4-4-4z"/>', "v": '<path d="M16 10l4-7h-8z"/>',
    "P": '<path d="M15 2h2v3h3v2h-3v3h-2v-3h-3v-2h3z"/>'}
_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1160px; padding: 24px 20px 48px; background: #fff; color: #1a1a1a;
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 12px; overflow-wrap: anywhere; }
h2 { font-size: 20px; line-height: 1.3; margin: 44px 0 6px; }
h3 { font-size: 14px; margin: 0 0 6px; overflow-wrap: anywhere; }
p { margin: 0 0 12px; max-width: 75ch; }
code { font-size: 0.92em; overflow-wrap: anywhere; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 10px 0 6px; padding: 0; list-style: none; font-size: 14px; }
.legend svg { width: 32px; height: 12px; margin-right: 6px; vertical-align: -1px; }
.legend li { overflow-wrap: anywhere; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(320px, 100%), 1fr)); gap: 12px 16px; }
.panels > svg { width: 100%; max-width: 480px; height: auto; display: block; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; font-weight: 600; vertical-align: bottom; }
th, td { padding: 3px 10px 3px 0; border-bottom: 1px solid #e6e6e6; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.strip { width: 42%; min-width: 110px; padding-left: 8px; }
.strip svg { display: block; width: 100%; height: 18px; overflow: visible; }
.strip text { font-size: 12px; font-weight: normal; fill: #333; }
.path { overflow-wrap: anywhere; }
.why { color: #555; }
.picture { display: grid; grid-template-columns: 240px 1fr; gap: 24px; margin-top: 12px; }
.picture figure, .maps figure { margin: 0; }
.picture img { width: 100%; display: block; image-rendering: pixelated; border: 1px solid #ccc; }
figcaption { font-size: 13px; color: #333; margin-top: 3px; }
.site { margin-bottom: 22px; }
.maps { display: grid; grid-template-columns: repeat(6, minmax(0, 1fr)); gap: 4px 10px; max-width: 840px; }
.maps .head { grid-column: span 3; font-size: 13px; margin: 0; }
footer { margin-top: 48px; padding-top: 10px; border-top: 1px solid #ccc; font-size: 13px; color: #444; }
@media (max-width: 700px) {
  body { padding: 16px 14px 32px; }
  h1 { font-size: 23px; }
  .wide { display: none; }
  table { font-size: 13px; }
  th, td { padding-right: 8px; }
  .strip { width: 26%; min-width: 84px; }
  .picture { grid-template-columns: 1fr; }
  .picture > figure { max-width: 240px; }
  .maps { grid-template-columns: repeat(3, minmax(0, 1fr)); }
  .maps .head { grid-column: 1 / -1; }
  .maps .last { order: 2; }
}
"""


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
    """A picture (3, H, W) from 0 to 1, its class if it has one, and its strongest channels."""

    image: torch.Tensor
    label: str | None
    sites: Sequence[StrongestChannels]


def page(
    report: GateReport, name: str, architecture: str | None, source: str, drawn: Sequence[Line], max_variation: float,
    picture: Picture,
) -> str:  # fmt: skip
    """The page as HTML.

    Args:
        report: What `gates` found.
        name: The model's name, for the title.
        architecture: Its timm name, if it has one.
        source: Where the images are from.
        drawn: The classes to draw, see `gate_plots.lines`.
        max_variation: The gates up to here are marked as those that `fold` takes.
        picture: An example.
    """
    parts = [_head(report, architecture, source)]
    if report.sites:
        parts += [_by_channel(report, drawn), _strip(report, max_variation)]
        if picture.sites:
            parts.append(_channels(picture))
    if report.left_out:
        parts.append(_left_out(report))
    title = f"The gates of {escape(name)}"
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_STYLE}</style>\n</head>\n<body>\n'
        f"<h1>{title}</h1>\n" + "\n".join(parts) +
        f"\n<footer>Made by <code>se-inject gates</code>, se_inject {version('se-inject')}. The figure by channel is figure 6 "
        "of Hu et al., Squeeze-and-Excitation Networks, arXiv 1709.01507.</footer>\n"
        "</body>\n</html>\n")


def _head(report: GateReport, architecture: str | None, source: str) -> str:
    of = f" of <code>{escape(architecture)}</code>" if architecture else ""
    counts = f"{len(report.sites)} blocks{of} on {report.images:,} images"
    classes = f" of {len(report.classes)} classes" if report.classes else ""
    return (
        "<p>A squeeze-and-excitation block looks at a whole feature map and multiplies each of its channels by one number, the "
        "<b>gate</b>. A gate of 1 leaves the channel as it is, as all gates do before the blocks are trained; a greater one "
        "raises it, and a smaller one lowers it.</p>\n"
        f"<p>This page shows the gates of {counts}{classes}, from <code>{escape(source)}</code>.</p>")


def _by_channel(report: GateReport, drawn: Sequence[Line]) -> str:
    shown = early_middle_last(report)
    where = ""
    if len(shown) == 3:
        where = ": of the first, the middle and the last stage, or third of the blocks, the one whose gates vary most"
    items = [
        f'<li><svg aria-hidden="true" style="fill:#fff;stroke:{c.color};stroke-width:1.4"><path d="M1 6h30"/>'
        f"{_MARKS[c.marker]}</svg>{escape(c.name)}</li>" for c in drawn]
    items.append(f'<li><svg aria-hidden="true"><path d="M1 6h30" stroke="{ALL}" stroke-width="2"/></svg>all images</li>')
    items.append('<li><svg aria-hidden="true"><path d="M1 1h30v10h-30z" fill="#000" opacity=".12"/></svg>'
                 "± 1 standard deviation over all images</li>")
    others = f" {len(drawn)} of {len(report.classes)} classes are drawn." if len(drawn) < len(report.classes) else ""
    says = ("Where the lines of the classes lie apart, the block treats the classes differently" if drawn else
            "Where the band is wide, the block treats the images differently")
    if any(len(channels_of(s)) < len(s.mean) for s in shown):
        others += " Of many channels, 50 at equal distances are drawn; their order has no meaning."
    return (
        f'<section id="channels">\n<h2>Mean gate by channel</h2>\n<p>Each panel is one block{where}. {says}.{others}</p>\n'
        f'<ul class="legend">{"".join(items)}</ul>\n'
        f'<div class="panels">{"".join(panel(report, s, drawn) for s in shown)}</div>\n</section>')


def _strip(report: GateReport, max_variation: float) -> str:
    end = 1.06 * max([max_variation, *(s.variation for s in report.sites)]) or 0.01
    taken = sum(s.folds(max_variation) for s in report.sites)
    ticks_at = _ticks(end)
    rows = "\n".join(_row(s, max_variation, end) for s in report.sites)
    ticks = "".join(
        f'<text class="{"" if t in (ticks_at[0], ticks_at[-1]) else "wide"}" x="{100 * t / end:.2f}%" y="14" '
        f'text-anchor="{"middle" if t else "start"}">{100 * t:.3g} %</text>' for t in ticks_at)
    return (
        '<section id="variation">\n<h2>How much the gates vary from image to image</h2>\n'
        "<p>For each block, from the input of the model to its output: the standard deviation over the images of each "
        "channel's gate, in percent of that channel's mean gate, averaged over the channels; channels whose mean is near 0 "
        "weigh much. A gate that hardly varies can be replaced by its mean: "
        f"<code>se_inject.fold(model, loader, max_variation={max_variation:g})</code> takes {taken} of {len(report.sites)} "
        "blocks out of the model and multiplies their mean gates into the weights, which saves their time.</p>\n"
        f'<ul class="legend"><li><svg aria-hidden="true">{_dot("16", True)}</svg>becomes a constant</li>'
        f'<li><svg aria-hidden="true">{_dot("16", False)}</svg>stays a block</li>'
        '<li><svg aria-hidden="true"><path d="M16 0v12" stroke="#555" stroke-dasharray="3 2"/></svg>'
        f"limit, {100 * max_variation:g} %</li></ul>\n"
        '<table>\n<thead><tr><th>block</th><th class="n wide">channels</th><th class="n wide">mean gate</th>'
        f'<th class="n">variation</th><th class="strip"><svg aria-hidden="true">{ticks}</svg></th><th>with fold</th></tr>'
        "</thead>\n"
        f"<tbody>\n{rows}\n</tbody>\n</table>\n</section>")


def _row(s: SiteGates, max_variation: float, end: float) -> str:
    taken = s.folds(max_variation)
    x, limit = f"{100 * s.variation / end:.2f}%", f"{100 * max_variation / end:.2f}%"
    fold = "constant" if taken else f'block: <span class="why">{escape(s.kept)}</span>' if s.kept else "block"
    return (
        f'<tr><td class="path">{_breakable(s.path)}</td><td class="n wide">{len(s.mean)}</td>'
        f'<td class="n wide">{float(s.mean.mean()):.4f}</td><td class="n">{100 * s.variation:.2f} %</td>'
        f'<td class="strip"><svg aria-hidden="true"><line x1="{limit}" x2="{limit}" y1="-4" y2="22" stroke="#555" '
        f'stroke-dasharray="3 2"/><line x1="0" x2="{x}" y1="9" y2="9" stroke="{TAKEN if taken else KEPT}"/>'
        f"{_dot(x, taken, 9)}</svg></td><td>{fold}</td></tr>")


def _breakable(path: str) -> str:
    """A dotted name that may be broken behind its dots."""
    return escape(path).replace(".", ".<wbr>")


def _dot(x: str, taken: bool, y: int = 6) -> str:
    color = TAKEN if taken else KEPT
    return f'<circle cx="{x}" cy="{y}" r="4.5" fill="{color if taken else "#fff"}" stroke="{color}" stroke-width="2"/>'


def _ticks(end: float) -> list[float]:
    """Round numbers from 0 to `end`, at most five."""
    step = next(s * 10.0 ** e for e in range(-12, 12) for s in (1, 2, 5) if s * 10.0 ** e * 4 >= end)
    return [i * step for i in range(5) if i * step <= end]


def _channels(picture: Picture) -> str:
    label = f"A picture of the class {escape(picture.label)}" if picture.label is not None else "A picture"
    sites = []
    for s in picture.sites:
        kinds = (("greatest gates", s.raised, ""), ("least gates", s.lowered, "last"))
        cells = "".join(f'<p class="head {kind}">{title}</p>' for title, _, kind in kinds)
        maps = "".join(_map(m, kind) for _, found, kind in kinds for m in found)
        sites.append(f'<div class="site"><h3>{escape(s.path)}</h3><div class="maps">{cells}{maps}</div></div>')
    return (
        '<section id="picture">\n<h2>One picture and its strongest channels</h2>\n'
        "<p>The channels that the gates raise most and lower most for this picture, as they come into the block, before the "
        "gate. Each map has a scale of its own: dark is its least value, and bright its greatest. Channels that are zero "
        "everywhere are not shown.</p>\n"
        f'<div class="picture"><figure><img alt="{label}" src="{_png(picture.image)}"><figcaption>{label}, as the model gets it'
        f'</figcaption></figure><div>{"".join(sites)}</div></div>\n</section>')


def _map(m: ChannelMap, kind: str) -> str:
    text = f"channel {m.channel}, gate {m.gate:.2f}"
    return (f'<figure class="{kind}"><img alt="{text}" src="{_png(_colored(m.map))}">'
            f"<figcaption>channel {m.channel}<br>gate {m.gate:.2f}</figcaption></figure>")


def _colored(values: torch.Tensor) -> torch.Tensor:
    """A map (H, W) in colors that the color-blind tell apart (3, H, W); the least value is dark."""
    low, high = float(values.min()), float(values.max())
    scaled = (values - low) / (high - low) if high > low else torch.zeros_like(values)
    colors = matplotlib().colormaps["cividis"](scaled.numpy())[..., :3]
    return torch.from_numpy(colors).permute(2, 0, 1)


def _png(image: torch.Tensor) -> str:
    """A picture (3, H, W) from 0 to 1 as a data URI."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray((image * 255).round().byte().permute(1, 2, 0).contiguous().numpy()).save(out, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def _left_out(report: GateReport) -> str:
    items: Iterable[str] = (f"<li><code>{escape(path)}</code>: {escape(why)}</li>" for path, why in report.left_out.items())
    return f'<section id="left-out">\n<h2>Blocks left out</h2>\n<ul>{"".join(items)}</ul>\n</section>'
