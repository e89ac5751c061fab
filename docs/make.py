"""Remake pages of this folder, in a clone.

    python docs/make.py cost [TABLE]...    run the commands above the tables of cost.md, or only of those named; with
                                           --again, as one more run beside those in cost-runs.csv
    python docs/make.py zoo CSV            write zoo.csv and zoo.md from the table of `se-inject zoo --out CSV`
    python docs/make.py how-it-works       print the worked example of how-it-works.md again
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import inspect
import re
import shlex
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import timm

import se_inject
from se_inject.config import SEConfig
from se_inject.find.attention import Gates
from se_inject.find.units import find_units
from se_inject.site import KINDS
from se_inject.surgery import pipeline
from se_inject.surgery.jobs import owner_jobs
from se_inject.tables import markdown_table, text_table
from se_inject.tools.zoo_table import Row, Table, parse_counts, read

DOCS = Path(__file__).parent
TABLE = re.compile(
    r"<!-- (?P<name>[\w-]+): begin -->\n\n```sh\n(?P<command>se-inject bench [^\n]+)\n```\n.*?<!-- (?P=name): end -->",
    re.DOTALL)
RANGES = re.compile(r"<!-- runs of (?P<names>[\w -]+): begin -->.*?<!-- runs of (?P=names): end -->", re.DOTALL)
ROW = ("model", "batch", "dtype", "variant")  # the columns that say what was timed
RATIOS = ("over base, optimized", "over base", "inject / create_model", "ratio")  # the first that a table has is kept
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


def remake_tables(page: Path, run: Callable[[Sequence[str]], str], only: Sequence[str] = (), again: bool = False) -> list[str]:
    """Replace the tables of a page, each by the output of the command above it, and write the page after each.

    The ratios of each run are kept beside the page, and the page shows their range.

    Args:
        page: A Markdown page. A table stands between ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``, below a blank
            line and the command in a block of ``sh``. A range of several tables stands between ``<!-- runs of NAME...: begin
            -->`` and its end.
        run: Returns the output of `se-inject` for the words of a command.
        only: Names of tables; empty is all.
        again: Whether earlier runs of these tables count, too.

    Returns:
        The names of the tables that were replaced.
    """
    text = page.read_text()
    commands = {m["name"]: m["command"] for m in TABLE.finditer(text)}
    unknown = [name for name in only if name not in commands]
    if unknown:
        sys.exit(f"{page} has no table {' or '.join(unknown)}; its tables are {', '.join(commands)}")
    made = [name for name in commands if name in only or not only]
    unknown = [name for m in RANGES.finditer(text) for name in m["names"].split() if name not in commands]
    if unknown:
        sys.exit(f"{page} has a range of {' and '.join(unknown)}; its tables are {', '.join(commands)}")
    file = page.with_name(f"{page.stem}-runs.csv")
    for name in made:
        output = run(shlex.split(commands[name])[1:]).strip()
        new = f"<!-- {name}: begin -->\n\n```sh\n{commands[name]}\n```\n\n{output}\n\n<!-- {name}: end -->"
        text = TABLE.sub(lambda m, name=name, new=new: new if m["name"] == name else m[0], text)
        runs = with_run(read_runs(file), name, output, again)
        write_runs(file, runs)
        text = with_ranges(text, runs)
        page.write_text(text)
    return made


Ratios = dict[tuple[str, ...], str]  # the median of a ratio, by the cells of `ROW`


def ratios(output: str) -> Ratios:
    """The ratios in a table of `se-inject bench`: those of the optimized models, where it has them."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines() if line.startswith("|")]
    header = lines[0] if lines else []
    column = next((c for c in RATIOS if c in header), None)
    rows = [dict(zip(header, line)) for line in lines[2:]]
    return {(row["model"], row.get("batch", ""), row.get("dtype", ""), row.get("variant", row.get("what", ""))):
            row[column].split()[0] for row in rows if column and row[column]}


def with_run(runs: dict[str, list[Ratios]], name: str, output: str, again: bool) -> dict[str, list[Ratios]]:
    """The runs of each table with one more of the table `name`, or with this alone."""
    found = ratios(output)
    return {**runs, name: [*(runs.get(name, []) if again else []), *([found] if found else [])]}


def read_runs(file: Path) -> dict[str, list[Ratios]]:
    runs: dict[str, dict[str, Ratios]] = defaultdict(lambda: defaultdict(dict))  # by table and number of the run
    if file.exists():
        with file.open(newline="") as f:
            for table, number, *row, ratio in list(csv.reader(f))[1:]:
                runs[table][number][tuple(row)] = ratio
    return {table: list(made.values()) for table, made in runs.items()}


def write_runs(file: Path, runs: dict[str, list[Ratios]]) -> None:
    rows = [(table, n, *row, ratio)
            for table, made in runs.items() for n, one in enumerate(made, 1) for row, ratio in one.items()]
    with file.open("w", newline="") as f:
        csv.writer(f, lineterminator="\n").writerows([("table", "run", *ROW, "ratio"), *rows])


def with_ranges(text: str, runs: dict[str, list[Ratios]]) -> str:
    """The text of a page, with the smallest and the largest ratio of all runs in its tables of ranges."""

    def ranges(names: list[str]) -> str:
        rows = dict.fromkeys(row for name in names for one in runs.get(name, []) for row in one)
        filled = [i for i in range(len(ROW)) if any(row[i] for row in rows)]
        counts = {name: len(runs.get(name, [])) for name in names}
        header = [ROW[i] for i in filled] + [f"{name}, {n} run{'s' if n != 1 else ''}" for name, n in counts.items()]
        lines = [[row[i] for i in filled] + [spread(name, row) for name in names] for row in rows]
        return markdown_table(header, lines, left=("model", "dtype", "variant"))

    def spread(name: str, row: tuple[str, ...]) -> str:
        found = sorted((one[row] for one in runs.get(name, []) if row in one), key=lambda ratio: float(ratio.rstrip("%")))
        return " to ".join(dict.fromkeys(found[:1] + found[-1:]))

    def replaced(m: re.Match[str]) -> str:
        names = m["names"].split()
        if not any(runs.get(name) for name in names):
            return m[0]
        return f"<!-- runs of {m['names']}: begin -->\n\n{ranges(names)}\n\n<!-- runs of {m['names']}: end -->"

    return RANGES.sub(replaced, text)


def run_command(words: Sequence[str]) -> str:
    """The output of one `se-inject` command, in a process of its own: memory is then as at the start."""
    done = subprocess.run([sys.executable, "-m", "se_inject", *words, "--markdown"], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"se-inject {shlex.join(words)} failed; its table is as before")
    return done.stdout


def worked_example() -> dict[str, str]:
    """What the package knows and makes of the first block of timm's `test_resnet`, step by step, as Markdown."""
    model, config = timm.create_model("test_resnet").eval(), SEConfig(placement="standard")
    owner = model.layer1[0]
    with pipeline.recorded(model, config) as traces:
        call, graph = traces.calls[owner][0], traces.view(owner)
        units, _ = find_units(traces, Gates(traces), config)
        unit = next(u for u in units if u.view.module is owner)
        found, _ = pipeline.placed_sites(model, traces, config)
        placed = next(f for f in found if f.view.module is owner)
        job = next(j for j in owner_jobs(found, traces) if j.module is owner)
        columns = ("module", "class", "input", "output")
        calls = [(c.path, type(c.module).__name__, str(tuple(c.args[0].shape)), str(tuple(c.output.shape)))
                 for c in (call, *call.children)]
        steps = {
            "call": text_table(columns, calls, left=columns),
            "graph": "\n".join(f"{n.name:<10}  {n.op:<13}  {_spelled(n)}".rstrip() for n in graph.nodes),
            "unit": _fields(kind=unit.kind, fork=unit.fork, branch=", ".join(n.name for n in graph.members(unit.branch)),
                            output=unit.output, merge=unit.merge, shortcuts=", ".join(map(str, unit.shortcuts))),
            "place": _fields(owner=placed.view.path, node=placed.place.node, users=placed.place.users),
            "site": _fields(**{k: v for k, v in dataclasses.asdict(placed.site).items() if k != "drawing"}),
            "edits": _fields(**{f.name: getattr(job.edits, f.name) for f in dataclasses.fields(job.edits)}),
        }
    se_inject.inject(model, config)
    forward = inspect.getsource(type(model.layer1[0]).forward)
    fast = se_inject.optimize_for_inference(model)
    optimized = inspect.getsource(type(fast.layer3[0]).forward)
    code = {"forward": _without_releases(forward), "optimized": _without_releases(optimized)}
    return {**{name: f"```\n{text}\n```" for name, text in {**steps, "report": str(fast.se_report)}.items()},
            **{name: f"```python\n{text}\n```" for name, text in code.items()}}


def _spelled(node) -> str:
    target = node.target if isinstance(node.target, str) else node.target.__name__
    return f"{target}({', '.join(map(str, node.args))})" if node.args else ""


def _fields(**values) -> str:
    width = max(map(len, values))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in values.items())


def _without_releases(code: str) -> str:
    """A generated forward without the ends of lines in which fx frees values."""
    return "\n".join(re.sub(r";  (\w+ = )+None$", "", line) for line in code.rstrip().splitlines())


def with_steps(page: str, steps: dict[str, str]) -> str:
    """The page with the text of each step between its two marks, ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``."""
    for name, text in steps.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if begin not in page:
            sys.exit(f"the page has no mark {begin}")
        head, _, rest = page.partition(begin)
        page = f"{head}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}"
    return page


def zoo_page(rows: list[Row]) -> str:
    """The zoo's table as a page: sites by family, and the reasons for what was refused and skipped."""
    families: dict[str, list[Row]] = defaultdict(list)
    refusals: dict[str, list[Row]] = defaultdict(list)
    skips: dict[str, list[tuple[Row, int]]] = defaultdict(list)
    for row in rows:
        families[row.family].append(row)
        if row.status == "refused":
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
    counts = [len(injected), sum(row.status == "refused" for row in rows), *(sites[kind] for kind in KINDS), skipped]
    shares = sorted(row.added_params / row.params for row in injected)
    return [name, str(len(rows)), *(str(n or "") for n in counts), f"{shares[0]:+.1%} to {shares[-1]:+.1%}" if shares else ""]


def _largest_first(groups: dict[str, list]) -> list[tuple[str, list]]:
    return sorted(groups.items(), key=lambda item: -len(item[1]))


def _names(rows: list[Row]) -> str:
    return ", ".join(sorted({row.family for row in rows}))


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pages = parser.add_subparsers(dest="page", required=True)
    cost = pages.add_parser("cost")
    cost.add_argument("tables", metavar="TABLE", nargs="*")
    cost.add_argument("--again", action="store_true")
    pages.add_parser("zoo").add_argument("csv", metavar="CSV", type=Path)
    pages.add_parser("how-it-works")
    given = parser.parse_args(args)
    if given.page == "how-it-works":
        page = DOCS / "how-it-works.md"
        page.write_text(with_steps(page.read_text(), worked_example()))
        return
    if given.page == "cost":
        print(", ".join(remake_tables(DOCS / "cost.md", run_command, given.tables, given.again)))
        return
    rows = [row for row in read(given.csv) if row.placement == "auto"]
    if not rows:
        sys.exit(f"{given.csv} has no rows with placement auto: make it with `se-inject zoo --out {given.csv}`")
    Table(DOCS / "zoo.csv", rows).finish()
    (DOCS / "zoo.md").write_text(zoo_page(rows))


if __name__ == "__main__":
    main()
