"""A benchmark's report as a table, for the terminal or for a Markdown page."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..tables import markdown_table, text_table
from .bench_report import STAGES, Comparison, Entry, Report
from .timing import Spread
from .variants import BASE, NATIVE, OPTIMIZED

Row = list[str]
_LEFT = ("model", "variant", "what", "compared with", "dtype")


def text(report: Report) -> str:
    """The report for the terminal."""
    return f"{caption(report)}\n\n{text_table(*table(report), left=_LEFT)}"


def markdown(report: Report) -> str:
    """The report for a page."""
    return f"{caption(report)}\n\n{markdown_table(*table(report), left=_LEFT)}"


def caption(report: Report) -> str:
    """How, where and how often it was measured."""
    machine, settings = report.machine, report.settings
    rounds = sorted({c.rounds for c in report.comparisons})
    many = f"{rounds[0]} round{'s' if rounds[0] > 1 else ''}" if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]} rounds"
    sizes = {c.size for c in report.comparisons if c.size}
    said = [f"{machine['device']}, {machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"]
    if report.measure in ("inference", "training"):
        said += [settings.dtypes[0]] if len(settings.dtypes) == 1 else []
        said += [settings.engine if settings.engine != "torch" else "channels_last" if settings.channels_last else "NCHW"]
        said += [f"compiled by {settings.backend}"] if settings.compile else []
        said += [", ".join("x".join(map(str, size)) for size in sorted(sizes))]
    said += [f"torch {machine['torch']}, timm {machine['timm']}", f"medians and quartiles of {many}"]
    return "; ".join(said) + "."


def table(report: Report) -> tuple[Row, list[Row]]:
    """The header and the rows."""
    header, row = _TABLES[report.measure]
    rows = [line for c in report.comparisons for line in row(c)]
    left_out = [i for i, name in enumerate(header)
                if not any(line[i] for line in rows) or (name == "dtype" and len(report.settings.dtypes) == 1)]
    return _without(header, left_out), [_without(line, left_out) for line in rows]


def _without(line: Row, positions: list[int]) -> Row:
    return [cell for i, cell in enumerate(line) if i not in positions]


_INFERENCE = [
    "model", "batch", "dtype", "variant", "ms", "quartiles", "over base", "over base, optimized", "peak, MB", "deviation"]


def _inference(c: Comparison) -> Iterator[Row]:
    for e in c.entries:
        yield [c.model, str(c.batch), str(c.dtype), _named(e), *_ms(e.seconds), _more(e, BASE), _more(e, BASE + OPTIMIZED),
               _mb(e.memory), "" if e.deviation is None else f"{e.deviation:.0e}"]  # fmt: skip


_TRAINING = ["model", "batch", "dtype", "variant", "ms", "quartiles", "over base", "peak, MB", "peak over base", "parameters"]


def _training(c: Comparison) -> Iterator[Row]:
    base = c.entries[0].memory
    for e in c.entries:
        share = f"{e.memory / base - 1:+.1%}" if e.memory and base and e.name != BASE else ""
        yield [c.model, str(c.batch), str(c.dtype), _named(e), *_ms(e.seconds), _more(e, BASE), _mb(e.memory), share,
               f"{e.params:,}"]  # fmt: skip


_SURGERY = [
    "model", "parameters", "nodes", "create_model, ms", "inject, ms", "inject / create_model", *STAGES, "ms per 1,000 nodes",
    "added, MB", "peak, MB"]


def _surgery(c: Comparison) -> Iterator[Row]:
    made, done = c.entries
    assert done.parts is not None and done.nodes is not None and done.params is not None
    ratio = done.ratios[made.name]
    yield [c.model, f"{made.params:,}", f"{done.nodes:,}", _ms(made.seconds)[0], _ms(done.seconds)[0],
           f"{ratio.median:.2f} ({ratio.q1:.2f} to {ratio.q3:.2f})",
           *(f"{1000 * done.parts[part]:.0f}" for part in STAGES),
           f"{1e6 * done.seconds.median / done.nodes:.0f}", _mb(4 * done.params), _mb(done.memory)]  # fmt: skip


_LOADING = ["model", "file, MB", "what", "ms", "quartiles", "compared with", "ratio", "peak, MB"]


def _loading(c: Comparison) -> Iterator[Row]:
    for e in c.entries:
        ((to, ratio),) = e.ratios.items()
        bare = to == e.name
        yield [c.model, _mb(e.file), e.name, *_ms(e.seconds), "" if bare else to,
               "" if bare else f"{ratio.median:.2f} ({ratio.q1:.2f} to {ratio.q3:.2f})", _mb(e.memory)]  # fmt: skip


_TABLES: dict[str, tuple[Row, Callable[[Comparison], Iterator[Row]]]] = {
    "inference": (_INFERENCE, _inference), "training": (_TRAINING, _training), "surgery": (_SURGERY, _surgery),
    "loading": (_LOADING, _loading), "startup": (_LOADING, _loading)}  # fmt: skip


def _named(e: Entry) -> str:
    return f"{e.name} ({e.architecture})" if e.name.startswith(NATIVE) else e.name


def _ms(s: Spread) -> tuple[str, str]:
    digits = 1 if s.median < 1 else 0
    return f"{1000 * s.median:,.{digits}f}", f"{1000 * s.q1:,.{digits}f} to {1000 * s.q3:,.{digits}f}"


def _more(e: Entry, to: str) -> str:
    s = e.ratios.get(to)
    if s is None or to == e.name:
        return ""
    return f"{s.median - 1:+.1%} ({s.q1 - 1:+.1%} to {s.q3 - 1:+.1%})"


def _mb(n: int | None) -> str:
    return "" if n is None else f"{n / 1e6:,.1f}"
