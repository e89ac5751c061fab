"""The scripts in examples/libraries and the table of docs/libraries.md: ``python -m tests.libraries [NAME...] [--here]``.

NAME is a requirement file of the folder, without its suffix: by default all. Its scripts are those whose names begin with it.
Each file gets an environment, with this clone and what the file asks for, which is deleted after its scripts have run. A script
prints its checks as one line of JSON; an error is shown in the table. The exit code is 1 if there is one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from docs.make import with_steps
from se_inject.tables import markdown_table

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "examples" / "libraries"
PAGE = ROOT / "docs" / "libraries.md"
CHECKS = ("identity", "blocks", "training", "save and load")
HEAD = ("library", "version", "torch", "script", *CHECKS, "also")
VERSIONS = "import importlib.metadata as m, json, sys; print(json.dumps([m.version(name) for name in sys.argv[1:]]))"
ERROR = re.compile(r"[\w.]+(Error|Exception|Interrupt|Exit)(: |$)")  # how the last line of a traceback begins
OFFLINE = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "YOLO_OFFLINE": "true"}  # a model is made, and never fetched


@dataclasses.dataclass(frozen=True)
class Row:
    """What one script showed: its checks, or its error."""

    library: str
    script: str
    version: str = ""
    torch: str = ""
    checks: dict[str, bool | int] = dataclasses.field(default_factory=dict)
    error: str = ""

    @property
    def failed(self) -> bool:
        return bool(self.error) or not all(self.checks.values())

    def cells(self) -> list[str]:
        said = {name: {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)
                for name, value in self.checks.items()}
        others = [name if said[name] == "yes" else f"{name}: {said[name]}" for name in said if name not in CHECKS]
        link = f"[{self.script}]({os.path.relpath(SCRIPTS, PAGE.parent)}/{self.script})"
        error = f"fails: {self.error}".replace("|", "\\|").replace("<", "&lt;") if self.error else ", ".join(others)
        return [self.library, self.version, self.torch, link, *(said.get(name, "") for name in CHECKS), error]


def requirement_files() -> dict[str, list[Path]]:
    """The scripts of each requirement file: those whose names begin with its own."""
    return {file.stem: sorted(SCRIPTS.glob(f"{file.stem}_*.py")) for file in sorted(SCRIPTS.glob("*.txt"))}


def library(name: str) -> str:
    """The library of a requirement file: the first that it asks for."""
    return re.split(r"[<>=!~\[; ]", (SCRIPTS / f"{name}.txt").read_text(), maxsplit=1)[0].strip()


def last_line(stderr: str) -> str:
    """The error that ended a program, in one line; an assertion without words is shown as it is written."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip(" ^~")]
    ends = [i for i, line in enumerate(lines) if ERROR.match(line)]
    if not ends:
        return lines[-1][:300] if lines else "no output"
    last = lines[ends[-1]]
    return f"{last}: {lines[ends[-1] - 1]}" if last == "AssertionError" else last[:300]


def run(script: Path, python: str = sys.executable, timeout: float = 600) -> tuple[dict[str, bool | int], str]:
    """The checks that a script made, or its error."""
    environment = {**os.environ, **OFFLINE}
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [python, str(script)], cwd=folder, env=environment, timeout=timeout, capture_output=True, text=True)
        except subprocess.TimeoutExpired:
            return {}, f"not done after {timeout:.0f} s"
    if done.returncode:
        return {}, last_line(done.stderr)
    try:
        checks = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        return {}, "printed no checks"
    return (checks, "") if isinstance(checks, dict) and checks else ({}, "printed no checks")


def rows_of(name: str, scripts: Sequence[Path], python: str = sys.executable) -> Iterator[Row]:
    """Run the scripts of a requirement file in an environment that has its library."""
    found = subprocess.run([python, "-c", VERSIONS, library(name), "torch"], capture_output=True, text=True)
    version, torch = json.loads(found.stdout) if found.returncode == 0 else ("", "")
    for script in scripts:
        checks, error = run(script, python)
        yield Row(library(name), script.name, version, torch, checks, error)


def installed_rows(name: str, scripts: Sequence[Path]) -> Iterator[Row]:
    """The same in a new environment, which is deleted at the end."""
    with tempfile.TemporaryDirectory(prefix="se_inject_") as folder:
        python = str(Path(folder, "bin", "python"))
        for command in (
            [sys.executable, "-m", "venv", folder],
            [python, "-m", "pip", "install", "-q", "-e", str(ROOT), "-r", str(SCRIPTS / f"{name}.txt")],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                errors = [line for line in done.stderr.splitlines() if line.startswith(("ERROR", "error"))]
                why = errors[-1] if errors else last_line(done.stderr)
                yield from (Row(library(name), script.name, error=f"not installed: {why}") for script in scripts)
                return
        yield from rows_of(name, scripts, python)


def table_of(page: str) -> dict[str, str]:
    """The lines of the page's table, by script."""
    return {match[1]: line for line in page.splitlines() if (match := re.search(r"\| \[(\w+\.py)\]", line))}


def with_rows(page: str, rows: Sequence[Row]) -> str:
    """The page with new rows; the others stay, but for those of scripts that are gone."""
    lines = {**table_of(page), **{row.script: markdown_table([], [row.cells()]).splitlines()[-1] for row in rows}}
    known = [script.name for scripts in requirement_files().values() for script in scripts]
    head = markdown_table(HEAD, [], left=HEAD)
    return with_steps(page, {"table": "\n".join([head, *(lines[name] for name in known if name in lines)])})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.libraries", description="run the scripts of docs/libraries.md")
    files = requirement_files()
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(files)}; by default all")
    parser.add_argument("--here", action="store_true", help="in the present environment, and install nothing")
    args = parser.parse_args(argv)
    unknown = [name for name in args.names if name not in files]
    if unknown:
        parser.error(f"no requirement file {' or '.join(unknown)} in {SCRIPTS}; there are {', '.join(files)}")
    failed = 0
    for name in args.names or files:
        for row in (rows_of if args.here else installed_rows)(name, files[name]):
            print(" | ".join(row.cells()), flush=True)
            failed += row.failed
            PAGE.write_text(with_rows(PAGE.read_text(), [row]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
