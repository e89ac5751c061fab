"""The smallest, the middle and the largest model of each family in docs/zoo.csv: `python -m tests.contract.zoo_sample`."""

from __future__ import annotations

import pathlib
from collections import defaultdict

from se_inject.tools import zoo_table

TABLE = pathlib.Path(__file__).parents[2] / "docs" / "zoo.csv"


def sample() -> list[str]:
    families = defaultdict(list)
    for row in zoo_table.read(TABLE):
        families[row.family].append(row)
    out: dict[str, None] = {}
    for rows in families.values():
        rows.sort(key=lambda r: r.params)
        out |= dict.fromkeys(rows[i].model for i in (0, len(rows) // 2, -1))
    return list(out)


if __name__ == "__main__":
    print("\n".join(sample()))
