"""The zoo's table: one row for each model, in a CSV file that grows while the zoo runs."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import os
from typing import Any

from ..errors import SEInjectError
from ..weights.replacing import write_atomically

_TYPES = {"str": str, "int": int, "float": float}


@dataclasses.dataclass(frozen=True)
class Row:
    """The answer for one model.

    Attributes:
        model: The timm name, or ``torchvision/`` and torchvision's name.
        family: The Python module that defines the model.
        placement: The placement that was asked for.
        status: ``injected``, ``refused`` or ``failed``; a failure is a defect of se_inject.
        reason: Why the model was refused or failed.
        sites: Injected sites by kind, such as ``residual: 16``.
        skipped: Skipped sites by reason.
        params: Parameters of the model before.
        added_params: Parameters of the blocks.
        macs: Multiply-adds of the model before, for one image.
        added_macs: Multiply-adds of the blocks, for one image.
        seconds: The time for all of it, from the creation of the model on.
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

    def compared(self) -> dict[str, object]:
        """The fields that two runs have in common: all but the time."""
        return {name: getattr(self, name) for name in self.fields() if name != "seconds"}


def counts_text(counts: dict[str, int]) -> str:
    """Counts as one cell of the table; `parse_counts` reads it."""
    return "; ".join(f"{key}: {n}" for key, n in sorted(counts.items()))


def parse_counts(text: str) -> dict[str, int]:
    items = (item.rpartition(": ") for item in text.split("; ") if item)
    return {key: int(n) for key, _, n in items}


def read(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a table; none where the file does not exist.

    Raises:
        SEInjectError: The file is not a table of the zoo.
    """
    if not os.path.exists(path):
        return []
    with open(path, newline="") as f:
        reader = csv.DictReader(f)
        if reader.fieldnames != Row.fields():
            raise SEInjectError(
                f"{str(path)!r} is no table of the zoo: expected the columns {Row.fields()}, found {reader.fieldnames}; "
                "name another file")
        rows = []
        for r in reader:
            with contextlib.suppress(TypeError, ValueError):  # an interrupted run can leave half a line
                rows.append(Row(**{f.name: _TYPES[str(f.type)](r[f.name]) for f in dataclasses.fields(Row)}))
        return rows


class Table:
    """A table that is appended to its file row by row, so that an interrupted run can continue."""

    def __init__(self, path: str | os.PathLike[str] | None, rows: list[Row]) -> None:
        self.path = path
        self.rows = list(rows)
        self._write()

    def add(self, row: Row) -> None:
        self.rows.append(row)
        if self.path is not None:
            with open(self.path, "a", newline="") as f:
                _writer(f).writerow(dataclasses.asdict(row))

    def finish(self) -> list[Row]:
        """Sort the rows by name, and return them."""
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
    """A line for each model whose row differs from the expected one in more than the time, or has none."""
    expected_rows = {r.model: r.compared() for r in expected}
    lines = []
    for row in rows:
        old = expected_rows.get(row.model)
        if old is None:
            lines.append(f"{row.model}: not in the expected table")
        elif old != row.compared():
            changed = [f"{f} was {old[f]!r}, is {value!r}" for f, value in row.compared().items() if old[f] != value]
            lines.append(f"{row.model}: {'; '.join(changed)}")
    return lines
