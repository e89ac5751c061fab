"""What a benchmark found, as a table for the terminal or a page, and pages whose tables are made anew."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ..errors import SEInjectError
from ..weights.writing import write_atomically
from .bench import Comparison, Entry, Report
from .timing import Spread
from .variants import BASE, OPTIMIZED

Row = list[str]
_COMMAND = re.compile(
    r"<!-- (?P<name>[\w-]+): begin -->\n\n```sh\n(?P<command>se-inject bench [^\n]+)\n```\n.*?<!-- (?P=name): end -->",
    re.DOTALL)


def text(report: Report) -> str:
    """For the terminal."""
    from rich.console import Console
    from rich.table import Table

    header, rows = table(report)
    drawn = Table(box=None, header_style="")
    for name in header:
        drawn.add_column(name, justify="left" if name in _LEFT else "right", no_wrap=True)
    for row in rows:
        drawn.add_row(*row)
    console = Console(width=200, color_system=None)
    with console.capture() as capture:
        console.print(drawn)
    return "\n".join([caption(report), "", *(line.rstrip() for line in capture.get().splitlines())])


def markdown(report: Report) -> str:
    """For a page."""
    header, rows = table(report)
    marks = ["---" if name in _LEFT else "---:" for name in header]
    return "\n".join([caption(report), "", *(f"| {' | '.join(line)} |" for line in (header, marks, *rows))])


_LEFT = {"model", "variant", "what", "compared with", "dtype"}


def caption(report: Report) -> str:
    """How and where it was measured."""
    machine, settings = report.machine, report.settings
    rounds = sorted({c.rounds for c in report.comparisons})
    many = f"{rounds[0]} round{'s' if rounds[0] > 1 else ''}" if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]} rounds"
    sizes = {c.size for c in report.comparisons if c.size}
    said = [f"{machine['device']}, {machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"]
    if report.measure in ("inference", "training"):
        said += [settings.dtypes[0]] if len(settings.dtypes) == 1 else []
        said += ["channels_last" if settings.channels_last else "NCHW"]
        said += ["compiled"] if settings.compile else []
        said += [", ".join("x".join(map(str, size)) for size in sorted(sizes))]
    said += [f"torch {machine['torch']}, timm {machine['timm']}", f"medians and quartiles of {many}"]
    return "; ".join(said) + "."


def table(report: Report) -> tuple[Row, list[Row]]:
    """Header and rows."""
    header, row = {
        "inference": (_INFERENCE, _inference), "training": (_TRAINING, _training), "surgery": (_SURGERY, _surgery),
        "loading": (_LOADING, _loading)}[report.measure]  # fmt: skip
    rows = [line for c in report.comparisons for line in row(c)]
    left_out = [i for i, name in enumerate(header) if name == "dtype" and len(report.settings.dtypes) == 1]
    return _without(header, left_out), [_without(line, left_out) for line in rows]


def _without(line: Row, positions: list[int]) -> Row:
    return [cell for i, cell in enumerate(line) if i not in positions]


_INFERENCE = [
    "model", "batch", "dtype", "variant", "ms", "quartiles", "over base", "over base, optimised", "peak, MB", "deviation"]


def _inference(c: Comparison) -> Iterable[Row]:
    for e in c.entries:
        yield [c.model, str(c.batch), str(c.dtype), _named(e), *_ms(e.seconds), _more(e, BASE), _more(e, BASE + OPTIMIZED),
               _mb(e.memory), "" if e.deviation is None else f"{e.deviation:.0e}"]  # fmt: skip


_TRAINING = ["model", "batch", "dtype", "variant", "ms", "quartiles", "over base", "peak, MB", "peak over base", "parameters"]


def _training(c: Comparison) -> Iterable[Row]:
    base = c.entries[0].memory
    for e in c.entries:
        share = f"{e.memory / base - 1:+.1%}" if e.memory and base and e.name != BASE else ""
        yield [c.model, str(c.batch), str(c.dtype), _named(e), *_ms(e.seconds), _more(e, BASE), _mb(e.memory), share,
               f"{e.params:,}"]  # fmt: skip


_SURGERY = [
    "model", "parameters", "nodes", "create_model, ms", "inject, ms", "inject / create_model", "record", "sites", "code",
    "apply", "ms per 1,000 nodes", "added, MB", "peak, MB"]


def _surgery(c: Comparison) -> Iterable[Row]:
    made, done = c.entries
    assert done.parts is not None and done.nodes is not None and done.params is not None
    ratio = done.ratios[made.name]
    yield [c.model, f"{made.params:,}", f"{done.nodes:,}", _ms(made.seconds)[0], _ms(done.seconds)[0],
           f"{ratio.median:.2f} ({ratio.q1:.2f} to {ratio.q3:.2f})",
           *(f"{1000 * done.parts[part]:.0f}" for part in ("record", "sites", "code", "apply")),
           f"{1e6 * done.seconds.median / done.nodes:.0f}", _mb(4 * done.params), _mb(done.memory)]  # fmt: skip


_LOADING = ["model", "file, MB", "what", "ms", "quartiles", "compared with", "ratio", "peak, MB"]


def _loading(c: Comparison) -> Iterable[Row]:
    for e in c.entries:
        ((to, ratio),) = e.ratios.items()
        bare = to == e.name
        yield [c.model, _mb(e.file), e.name, *_ms(e.seconds), "" if bare else to,
               "" if bare else f"{ratio.median:.2f} ({ratio.q1:.2f} to {ratio.q3:.2f})", _mb(e.memory)]  # fmt: skip


def _named(e: Entry) -> str:
    return f"{e.name} ({e.architecture})" if e.name.startswith("native") else e.name


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


def rewrite(path: str, run: Callable[[Sequence[str]], str], only: Sequence[str] = ()) -> list[str]:
    """Make the tables of a page anew, each by the command that stands above it, and write the page after each.

    Args:
        path: A Markdown page with ``<!-- NAME: begin -->``, a blank line, the command in a block of ``sh``, what is replaced,
            and ``<!-- NAME: end -->``.
        run: Given the words of a command after ``se-inject bench``, its output.
        only: Names of tables; empty is all.

    Returns:
        The names of the tables that were made.

    Raises:
        SEInjectError: The page has no such table.
    """
    try:
        page = Path(path).read_text()
    except OSError as error:
        raise SEInjectError(f"cannot read {path!r} ({error.strerror}): give a page with tables of se-inject bench") from error
    found = {m["name"]: m["command"] for m in _COMMAND.finditer(page)}
    unknown = [name for name in only if name not in found]
    if unknown or not found:
        raise SEInjectError(
            f"{path!r} has no table {' or '.join(unknown) or 'of se-inject bench'}, but {', '.join(found) or 'none at all'}: "
            "a table is <!-- NAME: begin -->, a command `se-inject bench ...` in a block of sh, and <!-- NAME: end -->")
    made = [name for name in found if not only or name in only]
    for name in made:
        shown = run(shlex.split(found[name])[2:])
        page = _COMMAND.sub(
            lambda m, name=name, shown=shown: _filled(m, shown) if m["name"] == name else m[0], page)  # type: ignore[misc]
        new = page
        write_atomically(path, lambda file, new=new: Path(file).write_text(new))  # type: ignore[misc]
    return made


def _filled(m: re.Match[str], shown: str) -> str:
    return f"<!-- {m['name']}: begin -->\n\n```sh\n{m['command']}\n```\n\n{shown.strip()}\n\n<!-- {m['name']}: end -->"
