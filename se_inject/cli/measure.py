"""Commands that measure: zoo, bench and gates."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import click

from ..config import SEConfig
from .models import saved_model
from .options import (
    ModelParam,
    Target,
    config_options,
    json_option,
    model_args_option,
    output_option,
    progress_bar,
    say,
    talks,
    target,
)


@click.command("zoo")
@click.argument("patterns", metavar="[PATTERN]...", nargs=-1)
@config_options("placement")
@click.option("--verify", type=click.Choice(["meta", "cpu"]), default="meta", show_default=True,
              help="meta runs each model without computing; cpu compares outputs before and after.")  # fmt: skip
@click.option("--out", metavar="CSV", help="A table with a row for each model; an existing table is continued.")
@click.option("--check", metavar="CSV", help="Fail if a model's row differs from the row in this table.")
@click.option("--jobs", type=click.IntRange(1), help="Worker processes; default one for each core.")
@click.option("--timeout", type=float, default=300.0, show_default=True, help="Seconds for one model.")
def zoo_command(
    patterns: tuple[str, ...], verify: str, out: str | None, check: str | None, jobs: int | None, timeout: float,
    options: dict[str, Any],
) -> None:  # fmt: skip
    """Plan, inject, run and eject all models that match PATTERN.

    PATTERN is of timm's names, or torchvision/PATTERN of torchvision's; without one, all of timm's. Each model is injected,
    or refused with a reason; anything else is a failure.
    """
    from ..tools import zoo, zoo_table

    found: dict[str, None] = {}
    for pattern in patterns or ("*",):
        matches = zoo.names(pattern)
        if not matches:
            raise click.ClickException(f"no model matches {pattern!r}; `se-inject list` has timm's names")
        found.update(dict.fromkeys(matches))
    placement = SEConfig.of(**options).placement
    expected = zoo_table.read(check) if check else []
    if check and not expected:
        raise click.ClickException(f"{check!r} holds no rows to check against; make it with --out {check}")
    before = [r for r in (zoo_table.read(out) if out else []) if r.status != "failed"]
    keep = [r for r in before if r.model in found and r.placement == placement]
    if keep:
        say(f"{len(keep)} of {len(found)} rows kept from {out}")
    table = zoo_table.Table(out, before)
    survey = zoo.survey(
        list(found), keep, placement=placement, verify=verify, jobs=jobs or os.cpu_count() or 1, timeout=timeout)
    for row in _with_progress(survey, len(found), len(keep)):
        table.add(row)
    rows = [r for r in table.finish() if r.model in found and r.placement == placement]
    by_status = {s: sum(r.status == s for r in rows) for s in ("injected", "refused", "failed")}
    click.echo(f"{len(rows)} models: " + ", ".join(f"{n} {s}" for s, n in by_status.items()))
    changed = zoo_table.differences(rows, expected) if check else []
    for line in changed:
        click.echo(line)
    if changed or by_status["failed"]:
        sys.exit(1)


def _with_progress(rows: Iterator[Any], total: int, completed: int) -> Iterator[Any]:
    """Yield `rows` behind a progress bar on stderr, and print those that failed."""
    with progress_bar() as progress:
        task = progress.add_task("zoo", total=total, completed=completed)
        for row in rows:
            yield row
            progress.update(task, advance=1, description=row.family)
            if row.status == "failed":
                progress.console.print(f"{row.model}: {row.reason}", markup=False)


@click.command("bench")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.option("--measure", type=click.Choice(["inference", "training", "surgery", "loading", "startup"]),
              default="inference", show_default=True,
              help="What to time; surgery is the injection itself, startup the start of a process.")  # fmt: skip
@click.option("--vs", "others", type=ModelParam(), multiple=True,
              help="Another timm model beside the base, such as 'se_inject/resnet50 se_block=eca'; repeatable.")  # fmt: skip
@model_args_option
@click.option("--batch", "batches", type=click.IntRange(1), multiple=True, metavar="N",
              help="Number of images; repeatable; default 1, for training 8.")  # fmt: skip
@click.option("--size", type=click.IntRange(1), metavar="H", help="Height and width of the images; default the model's.")
@click.option("--dtype", "dtypes", type=click.Choice(["float32", "bfloat16", "float16"]), multiple=True,
              default=["float32"], show_default=True, help="Of the model; in training, of autocast; repeatable.")  # fmt: skip
@click.option("--channels-last", is_flag=True, help="Use the memory format channels_last.")
@click.option("--compile", is_flag=True, help="Compile the models with torch.compile.")
@click.option("--backend", default="inductor", show_default=True,
              help="The backend of --compile, such as cudagraphs: torch's own kernels in CUDA graphs.")  # fmt: skip
@click.option("--engine", type=click.Choice(["torch", "onnxruntime", "openvino"]), default="torch", show_default=True,
              help="What runs the models, in inference; others than torch run the ONNX file of each.")  # fmt: skip
@click.option("--threads", type=click.IntRange(1), metavar="N", help="Threads of torch; default its own number.")
@click.option("--device", default="cpu", show_default=True, help="A device by torch's name; for surgery also meta.")
@click.option("--native/--no-native", default=True, show_default=True,
              help="Look for timm's own model with the same blocks.")  # fmt: skip
@click.option("--rounds", type=click.IntRange(1), metavar="N", help="Number of rounds, instead of --min-time.")
@click.option("--min-time", type=click.FloatRange(0), default=3.0, show_default=True, metavar="SECONDS",
              help="For each model, on average.")  # fmt: skip
@json_option
@click.option("--markdown", is_flag=True, help="Print a Markdown table.")
@config_options()
def bench_command(
    names: tuple[str, ...], measure: str, others: tuple[tuple[str, dict[str, Any]], ...], model_args: dict[str, Any],
    as_json: bool, markdown: bool, options: dict[str, Any], **settings: Any,
) -> None:  # fmt: skip
    """Time models with and without blocks, side by side.

    Compares the base NAME, the base with blocks, and timm's own model with the same blocks if there is one; in inference,
    also each as se_inject.optimize_for_inference makes it. Ratios are to the base, in the same rounds.
    """
    from ..tools import bench_tables
    from ..tools.bench import Settings, bench

    echo = functools.partial(click.echo, err=True) if talks() else lambda text: None
    report = bench(names, measure, SEConfig.of(**options), model_args, others, Settings(**settings), echo)
    click.echo(json.dumps(report.to_dict()) if as_json else
               bench_tables.markdown(report) if markdown else bench_tables.text(report))  # fmt: skip


@click.command("gates")
@target("FILE", img_size=True)
@click.argument("folder", metavar="FOLDER")
@output_option(required=False, help="A page (.html), or the figure for a paper (.png, .svg).")
@click.option("--classes", multiple=True, metavar="NAME", help="Draw this class; repeatable; default the first four.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Take N pictures, at equal distances; default all.")
@click.option("--batch", type=click.IntRange(1), default=32, show_default=True, metavar="N", help="Number of images at a time.")
@click.option("--max-variation", type=click.FloatRange(0, 1), default=0.05, show_default=True, metavar="X",
              help="Mark the gates that se_inject.fold takes with this limit.")  # fmt: skip
@json_option
def gates_command(
    target: Target, folder: str, output: str | None, classes: tuple[str, ...], limit: int | None, batch: int,
    max_variation: float, as_json: bool,
) -> None:  # fmt: skip
    """Show what the gates of a saved model do on pictures.

    FOLDER has the pictures in a subfolder for each class, or without classes. They are prepared as the model's data config
    says. Prints a table; with -o, also writes a page or a figure.
    """
    from ..rescale.read_gates import gates
    from ..tools import gate_files
    from ..tools.image_folder import open_folder

    if classes and output is None:
        raise click.UsageError("--classes says what is drawn: give -o OUT, too")
    model = saved_model(target)
    pictures = open_folder(folder, model, target.input_size(model), limit)
    if output is not None:
        gate_files.check(output, pictures, classes)
    with progress_bar() as progress:
        task = progress.add_task("images", total=len(pictures))

        def counted() -> Iterator[Any]:
            for one in pictures.loader(batch):
                yield one
                progress.update(task, advance=len(one[0]))

        report = gates(model, counted(), class_names=pictures.classes or None)
    click.echo(json.dumps(report.to_dict()) if as_json else str(report))
    if output is not None:
        gate_files.write(output, report, model, pictures, target.source, folder, classes, max_variation)
        say(f"written to {output}")
