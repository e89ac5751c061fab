"""TODO"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from ..errors import SEInjectError
from ..site import KINDS
from ..weights.writing import write_atomically

_TYPES = {"str": str, "int": int, "float": float}


@dataclasses.dataclass(frozen=True)
class Row:
    """The answer for one model.

    Attributes:
        model: The timm name, or ``torchvision/`` and torchvision's.
        family: The module that defines it.
        placement: As asked.
        status: ``injected``, ``refused`` or ``failed``; the last is a defect.
        reason: Why it was refused or failed.
        sites: Injected sites by kind, as in ``residual: 16``.
        skipped: Skipped sites by reason.
        params, macs: Of the model before: parameters, and multiply-adds for one image.
        added_params, added_macs: What the blocks add.
        seconds: Time for all of it, making the model included.
    """

    model: str
    family: str
    placement: str
    status: str
    reason: str = ""
    sites: str = ""
    skipped: str = ""
    params: int = 0
    added_params: int = 0
    macs: int = 0
    added_macs: int = 0
    seconds: float = 0.0

    @classmethod
    def fields(cls) -> list[str]:
        return [f.name for f in dataclasses.fields(cls)]

    def answer(self) -> tuple[object, ...]:
        """What must not change unannounced: everything but the time."""
        return dataclasses.astuple(dataclasses.replace(self, seconds=0.0))

    def count(self, kind: str) -> int:
        return dict(_parse_counts(self.sites)).get(kind, 0)


def counts_text(counter: dict[str, int]) -> str:
    return "; ".join(f"{key}: {n}" for key, n in sorted(counter.items()))


def _parse_counts(text: str) -> Iterator[tuple[str, int]]:
    for item in text.split("; ") if text else ():
        key, _, n = item.rpartition(": ")
        yield key, int(n)


def read(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a table that was written before; none where there is no file.

    Raises:
        SEInjectError: The file is no such table.
    """
    if not os.path.exists(path):
        return []
    with open(path, newline="") as f:
        reader = csv.DictReader(f)
        if reader.fieldnames != Row.fields():
            raise SEInjectError(f"{str(path)!r} is no table of the zoo: its columns are {reader.fieldnames}; name another file")
        rows = []
        for r in reader:
            with contextlib.suppress(TypeError, ValueError):  # a line cut off by an interruption
                rows.append(Row(**{f.name: _TYPES[str(f.type)](r[f.name]) for f in dataclasses.fields(Row)}))
        return rows


class Table:
    """A table on disk that grows by a line for each row, so that a run can be interrupted and go on."""

    def __init__(self, path: str | os.PathLike[str] | None, keep: list[Row]) -> None:
        self.path = path
        self.rows = list(keep)
        self._write()

    def add(self, row: Row) -> None:
        self.rows.append(row)
        if self.path is not None:
            with open(self.path, "a", newline="") as f:
                _writer(f).writerow(dataclasses.asdict(row))

    def finish(self) -> list[Row]:
        """Put the rows into the order of their names."""
        self.rows.sort(key=lambda r: (r.model, r.placement))
        self._write()
        return self.rows

    def _write(self) -> None:
        if self.path is None:
            return

        def write(temporary: str) -> None:
            with open(temporary, "w", newline="") as f:
                writer = _writer(f)
                writer.writeheader()
                writer.writerows(map(dataclasses.asdict, self.rows))

        write_atomically(self.path, write)


def _writer(f: Any) -> Any:
    return csv.DictWriter(f, Row.fields(), lineterminator="\n")


def differences(rows: list[Row], expected: list[Row]) -> list[str]:
    """Where two tables say different things of a model, in words; times are not compared."""
    old = {r.model: r for r in expected}
    new = {r.model: r for r in rows}
    out = [f"{n}: not in the expected table" for n in new if n not in old]
    for name in new:
        if name in old and new[name].answer() != old[name].answer():
            changed = [
                f"{f} was {getattr(old[name], f)!r}, is {getattr(new[name], f)!r}" for f in Row.fields()
                if f != "seconds" and getattr(old[name], f) != getattr(new[name], f)]
            out.append(f"{name}: {'; '.join(changed)}")
    return out


def page(rows: list[Row], command: str) -> str:
    """The rows as a Markdown page: by family, what was placed, and why models were refused."""
    status = Counter(r.status for r in rows)
    lines = [
        "# The zoo", "",
        f"{len(rows):,} models: {status['injected']:,} injected, {status['refused']:,} refused with a reason, "
        f"{status['failed']:,} failed. Made by", "", "```sh", command, "```", "",
        "A model is planned, injected, run and ejected, all on the meta device. Each row of the table is one model; "
        "this page sums them by family. Sites are counts over all models of the family.", "",
        f"| family | models | injected | refused | {' | '.join(KINDS.values())} | skipped | parameters added |",
        "|---|" + "---:|" * (len(KINDS) + 5),
    ]
    groups: dict[str, list[Row]] = defaultdict(list)
    for r in rows:
        groups[r.family].append(r)
    for name, group in sorted(groups.items()):
        injected = [r for r in group if r.status == "injected"]
        shares = sorted(r.added_params / r.params for r in injected)
        share = f"{shares[0]:+.1%} to {shares[-1]:+.1%}" if shares else ""
        counts = " | ".join(str(sum(r.count(k) for r in group) or "") for k in KINDS)
        skipped = sum(n for r in group for _, n in _parse_counts(r.skipped))
        lines.append(
            f"| {name} | {len(group)} | {len(injected) or ''} | {len(group) - len(injected) or ''} | {counts} | "
            f"{skipped or ''} | {share} |")
    lines += ["", "## Why models were refused", "", "| reason | models | families |", "|---|---:|---|"]
    reasons: dict[str, list[Row]] = defaultdict(list)
    for r in rows:
        if r.status != "injected":
            reasons[_without_numbers(r.reason)].append(r)
    for reason, group in sorted(reasons.items(), key=lambda item: -len(item[1])):
        lines.append(f"| {reason} | {len(group)} | {', '.join(sorted({r.family for r in group}))} |")
    lines += ["", "## Why sites were skipped", "", "| reason | sites | models | families |", "|---|---:|---:|---|"]
    sites: dict[str, list[tuple[Row, int]]] = defaultdict(list)
    for r in rows:
        for reason, n in _parse_counts(r.skipped):
            sites[reason].append((r, n))
    for reason, found in sorted(sites.items(), key=lambda item: -len(item[1])):
        families = sorted({r.family for r, _ in found})
        lines.append(f"| {reason} | {sum(n for _, n in found):,} | {len(found)} | {', '.join(families)} |")
    return "\n".join(lines) + "\n"


def write_page(path: str | os.PathLike[str], rows: list[Row], command: str) -> None:
    def write(temporary: str) -> None:
        with open(temporary, "w") as f:
            f.write(page(rows, command))

    write_atomically(path, write)


def _without_numbers(reason: str) -> str:
    return " ".join(w for w in reason.split() if not w.isdigit())
