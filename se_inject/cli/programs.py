"""TODO"""

from __future__ import annotations

import dataclasses
import json
import os
from typing import Any

import click

from ..errors import SEInjectError
from .models import saved_model
from .options import export_options, say


@click.command("optimize")
@export_options
@click.option("--json", "as_json", is_flag=True, help="What was done, as JSON.")
def optimize_command(
    file: str, output: str | None, model: str | None, model_kwargs: tuple[tuple[str, Any], ...], img_size: int | None,
    dynamic_batch: bool, as_json: bool,
) -> None:  # fmt: skip
    """Make a saved model quicker for inference, say what was done, and write it to OUT as a program, where that is given.

    FILE may hold an injected model, one of timm's with SE, or one without.
    """
    _export(file, output, model, model_kwargs, img_size, dynamic_batch, True, as_json)


@click.command("export")
@export_options
@click.option("--optimize/--no-optimize", default=False, show_default=True, help="As `se-inject optimize` does.")
def export_command(
    file: str, output: str | None, model: str | None, model_kwargs: tuple[tuple[str, Any], ...], img_size: int | None,
    dynamic_batch: bool, optimize: bool,
) -> None:  # fmt: skip
    """Write a saved model to OUT as a program that runs without its Python."""
    if output is None:
        raise click.UsageError("Missing option '-o' / '--output'.")
    _export(file, output, model, model_kwargs, img_size, dynamic_batch, optimize, None)


def _export(
    file: str, output: str | None, model: str | None, model_kwargs: tuple[tuple[str, Any], ...], img_size: int | None,
    dynamic_batch: bool, optimize: bool, as_json: bool | None,
) -> None:  # fmt: skip
    """`as_json` is None where nothing is to be said of what was done."""
    from ..capture.inputs import input_sizes
    from ..inference.export import FORMATS, export
    from ..inference.optimize import optimize_for_inference

    if output is not None and os.path.splitext(output)[1] not in FORMATS:
        raise click.UsageError(f"{output!r}: OUT ends in {' or '.join(FORMATS)}")
    net = saved_model(file, model, model_kwargs)
    size = (input_sizes(net)[0][0], img_size, img_size) if img_size else None
    if optimize:
        net = optimize_for_inference(net, input_size=size)
    if as_json is not None:
        click.echo(json.dumps(net.se_report.to_dict()) if as_json else str(net.se_report))
    if output is not None:
        export(net, output, input_size=size, dynamic_batch=dynamic_batch)
        say(f"written to {output}")


@click.command("run", context_settings={"allow_interspersed_args": False})
@click.option("-m", "as_module", is_flag=True, help="SCRIPT is a module, as for python -m.")
@click.argument("script", metavar="SCRIPT")
@click.argument("args", metavar="[ARGS]...", nargs=-1, type=click.UNPROCESSED)
def run_command(script: str, args: tuple[str, ...], as_module: bool) -> None:
    """Run a Python script that knows nothing of se_inject, with "se_inject/..." among timm's models.

    ARGS are the script's own, and so are its logging, its errors and its exit code.
    """
    from ..tools import run_script

    if not as_module and not os.path.isfile(script):
        raise click.UsageError(f"there is no script {script!r} in {os.getcwd()}: give its file, or -m and a module's name")
    run_script.run(script, args, module=as_module)


@click.command("demo")
@click.option("-o", "--output", default="tf_efficientnet_lite0_se.safetensors", show_default=True, metavar="OUT",
              help="The safetensors file to write.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="The predictions as JSON.")
def demo_command(output: str, as_json: bool) -> None:
    """Inject EfficientNet-Lite0 with its ImageNet weights, and classify photographs before and after."""
    from ..tools.demo import run

    result = run(output, say)
    click.echo(json.dumps([dataclasses.asdict(p) for p in result.photos]) if as_json else str(result))
    if not result.exact:
        raise SEInjectError("the injected model's logits differ from the base's")
