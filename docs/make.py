"""Remake pages of this folder, in a clone.

    python docs/make.py cost [TABLE]...    run the commands above the tables of cost.md, or only of those named
    python docs/make.py zoo CSV            write zoo.csv and zoo.md from the table of `se-inject zoo --out CSV`
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from se_inject.site import KINDS
from se_inject.tables import markdown_table
from se_inject.tools.zoo_table import Row, Table, parse_counts, read

DOCS = Path(__file__).parent
TABLE = re.compile(
    r"<!-- (?P<name>[\w-]+): begin -->\n\n```sh\n(?P<command>se-inject bench [^\n]+)\n```\n.*?<!-- (?P=name): end -->",
    re.DOTALL)
ZOO = """\
# The zoo

{models:,} models: {injected:,} injected, {refused:,} refused with a reason, {failed:,} failed. Made by

```sh
se-inject zoo '*' 'torchvision/*' --out new.csv
python docs/make.py zoo new.csv
```

A model is planned, injected, run and ejected, all on the meta device. Each row of the table [zoo.csv](zoo.csv) is one model;
this page sums them by family. Sites are counts over all models of the family.

{families}

## Why models were refused

{refusals}

## Why sites were skipped

{skips}
"""


def remake_tables(page: Path, run: Callable[[Sequence[str]], str], only: Sequence[str] = ()) -> list[str]:
    """Replace the tables of a page, each by the output of the command above it, and write the page after each.

    Args:
        page: A Markdown page. A table stands between ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``, below a blank
            line and the command in a block of ``sh``.
        run: Returns the output of `se-inject` for the words of a command.
        only: Names of tables; empty is all.

    Returns:
        The names of the tables that were replaced.
    """
    text = page.read_text()
    commands = {m["name"]: m["command"] for m in TABLE.finditer(text)}
    unknown = [name for name in only if name not in commands]
    if unknown:
        sys.exit(f"{page} has no table {' or '.join(unknown)}; its tables are {', '.join(commands)}")
    made = [name for name in commands if name in only or not only]
    for name in made:
        output = run(shlex.split(commands[name])[1:]).strip()
        new = f"<!-- {name}: begin -->\n\n```sh\n{commands[name]}\n```\n\n{output}\n\n<!-- {name}: end -->"
        text = TABLE.sub(lambda m, name=name, new=new: new if m["name"] == name else m[0], text)
        page.write_text(text)
    return made


def run_command(words: Sequence[str]) -> str:
    """The output of one `se-inject` command, in a process of its own: memory is then as at the start."""
    done = subprocess.run([sys.executable, "-m", "se_inject", *words, "--markdown"], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"se-inject {shlex.join(words)} failed; its table is as before")
    return done.stdout


def zoo_page(rows: list[Row]) -> str:
    """The zoo's table as a page: sites by family, and the reasons for what was refused and skipped."""
    families: dict[str, list[Row]] = defaultdict(list)
    refusals: dict[str, list[Row]] = defaultdict(list)
    skips: dict[str, list[tuple[Row, int]]] = defaultdict(list)
    for row in rows:
        families[row.family].append(row)
        if row.status != "injected":
            refusals[" ".join(w for w in row.reason.split() if not w.isdigit())].append(row)
        for reason, count in parse_counts(row.skipped).items():
            skips[reason].append((row, count))
    status = Counter(row.status for row in rows)
    return ZOO.format(
        models=len(rows), injected=status["injected"], refused=status["refused"], failed=status["failed"],
        families=markdown_table(
            ("family", "models", "injected", "refused", *KINDS.values(), "skipped", "parameters added"),
            [_family(name, group) for name, group in sorted(families.items())], left=("family",)),
        refusals=markdown_table(
            ("reason", "models", "families"),
            [(reason, str(len(group)), _names(group)) for reason, group in _largest_first(refusals)],
            left=("reason", "families")),
        skips=markdown_table(
            ("reason", "sites", "models", "families"),
            [(reason, f"{sum(n for _, n in group):,}", str(len(group)), _names([row for row, _ in group]))
             for reason, group in _largest_first(skips)],
            left=("reason", "families")))


def _family(name: str, rows: list[Row]) -> list[str]:
    injected = [row for row in rows if row.status == "injected"]
    sites: Counter[str] = Counter()
    for row in rows:
        sites.update(parse_counts(row.sites))
    skipped = sum(sum(parse_counts(row.skipped).values()) for row in rows)
    counts = [len(injected), len(rows) - len(injected), *(sites[kind] for kind in KINDS), skipped]
    shares = sorted(row.added_params / row.params for row in injected)
    return [name, str(len(rows)), *(str(n or "") for n in counts), f"{shares[0]:+.1%} to {shares[-1]:+.1%}" if shares else ""]


def _largest_first(groups: dict[str, list]) -> list[tuple[str, list]]:
    return sorted(groups.items(), key=lambda item: -len(item[1]))


def _names(rows: list[Row]) -> str:
    return ", ".join(sorted({row.family for row in rows}))


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pages = parser.add_subparsers(dest="page", required=True)
    pages.add_parser("cost").add_argument("tables", metavar="TABLE", nargs="*")
    pages.add_parser("zoo").add_argument("csv", metavar="CSV", type=Path)
    given = parser.parse_args(args)
    if given.page == "cost":
        print(", ".join(remake_tables(DOCS / "cost.md", run_command, given.tables)))
        return
    rows = [row for row in read(given.csv) if row.placement == "auto"]
    if not rows:
        sys.exit(f"{given.csv} has no rows with placement auto: make it with `se-inject zoo --out {given.csv}`")
    Table(DOCS / "zoo.csv", rows).finish()
    (DOCS / "zoo.md").write_text(zoo_page(rows))


if __name__ == "__main__":
    main()
