"""Tables: aligned with spaces for the terminal, or in Markdown for a page."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[str] = ()) -> str:
    """A table for the terminal.

    Args:
        header: The names of the columns.
        rows: The cells of each row, one for each column.
        left: The columns that are aligned to the left, by name; numbers are easier to compare aligned to the right.
    """
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    sides = ["<" if name in left else ">" for name in header]
    return "\n".join(
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths)).rstrip() for line in lines)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[str] = ()) -> str:
    """The same table in Markdown."""
    marks = ["---" if name in left else "---:" for name in header]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, marks, *rows))
