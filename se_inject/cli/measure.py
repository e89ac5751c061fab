"""TODO"""

from __future__ import annotations

import functools
import json
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import click

from ..config import PLACEMENTS, SEConfig
from ..errors import SEInjectError
from .options import ModelParam, config_options, given_options, model_args_option, say, timm_arguments


@click.command("zoo")
@click.argument("patterns", metavar="[PATTERN]...", nargs=-1)
@click.option("--placement", type=click.Choice(PLACEMENTS), default="auto", show_default=True, help="Where in the branch.")
@click.option("--verify", type=click.Choice(["meta", "cpu"]), default="meta", show_default=True,
              help="meta runs each model without computing; cpu compares outputs before and after.")  # fmt: skip
@click.option("--out", metavar="CSV", help="A table with a row per model; where it is there, the run goes on from it.")
@click.option("--page", metavar="MD", help="Write a page that sums the table by family.")
@click.option("--check", metavar="CSV", help="Fail where a model's answer is not the one in this table.")
@click.option("--jobs", type=click.IntRange(1), help="Worker processes; default one per core.")
@click.option("--timeout", type=float, default=300.0, show_default=True, help="Seconds for one model.")
def zoo_command(
    patterns: tuple[str, ...], placement: str, verify: str, out: str | None, page: str | None, check: str | None,
    jobs: int | None, timeout: float,
) -> None:  # fmt: skip
    """Answer for every model of timm that matches a PATTERN, or of torchvision for 'torchvision/PATTERN'.

    Without one, all of timm. Each comes out injected or refused with a reason; anything else is a failure.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ..tools import zoo, zoo_table

    found: dict[str, None] = {}
    for pattern in patterns or ("*",):
        matches = zoo.names(pattern)
        if not matches:
            raise click.ClickException(f"no model matches {pattern!r}; `se-inject list` has timm's names")
        found.update(dict.fromkeys(matches))
    names = list(found)
    expected = zoo_table.read(check) if check else []
    if check and not expected:
        raise click.ClickException(f"{check!r} holds no rows to check against; make it with --out {check}")
    there = [r for r in (zoo_table.read(out) if out else []) if r.status != "failed"]
    wanted = set(names)
    keep = [r for r in there if r.model in wanted and r.placement == placement]
    if keep:
        say(f"{len(keep)} of {len(names)} rows kept from {out}")
    table = zoo_table.Table(out, there)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    quiet = not logging.getLogger("se_inject").isEnabledFor(logging.INFO)
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet) as progress:
        task = progress.add_task("zoo", total=len(names), completed=len(keep))
        for row in zoo.survey(
                names, keep, placement=placement, verify=verify, jobs=jobs or os.cpu_count() or 1, timeout=timeout):
            table.add(row)
            progress.update(task, advance=1, description=row.family)
            if row.status == "failed":
                progress.console.print(f"{row.model}: {row.reason}", markup=False)
    rows = [r for r in table.finish() if r.model in wanted and r.placement == placement]
    if page:
        asked = " ".join(f"'{p}'" for p in patterns or ("*",))
        zoo_table.write_page(page, rows, f"se-inject zoo {asked} --placement {placement} --verify {verify}")
    by_status = {s: sum(r.status == s for r in rows) for s in ("injected", "refused", "failed")}
    click.echo(f"{len(rows)} models: " + ", ".join(f"{n} {s}" for s, n in by_status.items()))
    changed = zoo_table.differences(rows, expected) if check else []
    for line in changed:
        click.echo(line)
    if changed or by_status["failed"]:
        sys.exit(1)


@click.command("bench")
@click.argument("names", metavar="NAME...", nargs=-1)
@click.option("--measure", type=click.Choice(["inference", "training", "surgery", "loading"]), default="inference",
              show_default=True, help="What is timed; surgery is the injection itself.")  # fmt: skip
@click.option("--vs", "others", type=ModelParam(), multiple=True,
              help="Another timm model beside the base, such as 'se_inject/resnet50 se_block=eca'; repeatable.")  # fmt: skip
@model_args_option
@click.option("--batch", "batches", type=click.IntRange(1), multiple=True, metavar="N",
              help="Images; repeatable; default 1, for training 8.")  # fmt: skip
@click.option("--size", type=click.IntRange(1), metavar="H", help="Height and width of the images; default the model's own.")
@click.option("--dtype", "dtypes", type=click.Choice(["float32", "bfloat16", "float16"]), multiple=True,
              help="Of the model; in training, of autocast; repeatable; default float32.")  # fmt: skip
@click.option("--channels-last", is_flag=True, help="Model and images in that memory format.")
@click.option("--compile", "compiled", is_flag=True, help="By torch.compile.")
@click.option("--threads", type=click.IntRange(1), metavar="N", help="Default torch's.")
@click.option("--device", default="cpu", show_default=True, help="As torch names it; for surgery also meta.")
@click.option("--native/--no-native", default=True, show_default=True, help="Look for timm's own twin of the injected model.")
@click.option("--rounds", type=click.IntRange(1), metavar="N", help="How often each is timed, in turn, instead of --min-time.")
@click.option("--min-time", type=click.FloatRange(0), default=3.0, show_default=True, metavar="SECONDS",
              help="For each variant, on average.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON.")
@click.option("--markdown", is_flag=True, help="The table as a page has it.")
@click.option("--write", "page", metavar="PAGE", help="Instead of NAME: make this page's tables anew, by the commands in it.")
@click.option("--table", "tables", multiple=True, metavar="NAME", help="With --write, this table alone; repeatable.")
@config_options
def bench_command(
    names: tuple[str, ...], measure: str, others: tuple[tuple[str, dict[str, Any]], ...],
    model_kwargs: tuple[tuple[str, Any], ...], batches: tuple[int, ...], size: int | None, dtypes: tuple[str, ...],
    channels_last: bool, compiled: bool, threads: int | None, device: str, native: bool, rounds: int | None, min_time: float,
    as_json: bool, markdown: bool, page: str | None, tables: tuple[str, ...], **given: Any,
) -> None:  # fmt: skip
    """Time models with and without blocks, in turn, and give ratios to the base.

    A comparison has the base NAME, the base with blocks, and timm's own model with the same blocks where there is one; in
    inference each also as se_inject.optimize_for_inference makes it.
    """
    options, args = given_options(given), timm_arguments(model_kwargs)
    if bool(names) == bool(page):
        raise click.UsageError("expected one or more NAMEs, such as resnet50, or --write PAGE")
    if page:
        _rewrite(page, tables, rounds)
        return
    from ..tools import bench_tables
    from ..tools.bench import Settings, bench

    settings = Settings(
        batches or (8 if measure == "training" else 1,), dtypes or ("float32",), size, threads, device, channels_last, compiled,
        native, rounds, min_time)
    talks = logging.getLogger("se_inject").isEnabledFor(logging.INFO)
    say = functools.partial(click.echo, err=True) if talks else lambda text: None
    report = bench(names, measure, SEConfig.of(**options), args, others, settings, say)
    click.echo(json.dumps(report.to_dict()) if as_json else
               bench_tables.markdown(report) if markdown else bench_tables.text(report))  # fmt: skip


def _rewrite(page: str, tables: tuple[str, ...], rounds: int | None) -> None:
    """Each table in a process of its own, whose memory is as at the start."""
    import subprocess

    from ..tools.bench_tables import rewrite

    def run(words: Sequence[str]) -> str:
        more = [] if rounds is None else ["--rounds", str(rounds)]
        command = [sys.executable, "-m", "se_inject", "bench", *words, *more, "--markdown"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SEInjectError(f"{page!r}: se-inject bench {shlex.join(words)} failed; that table is as it was")
        return done.stdout

    click.echo(", ".join(rewrite(page, run, tables)))
