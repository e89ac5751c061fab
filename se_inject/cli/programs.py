"""Commands that make programs or run them: optimize, export, run, demo."""

from __future__ import annotations

import dataclasses
import functools
import json
import os

import click

from ..errors import SEInjectError
from .models import saved_model
from .options import Target, json_option, output_option, progress_bar, say, target

_PROGRAM = "A file for torch.export.load (.pt2) or ONNX (.onnx)."
_batch_option = click.option(
    "--dynamic-batch/--one-image", default=True, show_default=True, help="Whether OUT takes any number of images, or one.")


@click.command("optimize")
@target("FILE", img_size=True)
@output_option(required=False, help=_PROGRAM)
@_batch_option
@json_option
def optimize_command(target: Target, output: str | None, dynamic_batch: bool, as_json: bool) -> None:
    """Make a saved model faster for inference, and report how.

    With -o, also write it to OUT as a program. FILE may hold an injected model, one of timm's with SE, or one without.
    """
    _program(target, output, dynamic_batch, optimize=True, report="json" if as_json else "text")


@click.command("export")
@target("FILE", img_size=True)
@output_option(help=_PROGRAM)
@_batch_option
@click.option("--optimize/--no-optimize", default=False, show_default=True, help="As `se-inject optimize` does.")
def export_command(target: Target, output: str, dynamic_batch: bool, optimize: bool) -> None:
    """Write a saved model to OUT as a program without Python code."""
    _program(target, output, dynamic_batch, optimize)


def _program(target: Target, output: str | None, dynamic_batch: bool, optimize: bool, report: str | None = None) -> None:
    """Optimize the model if asked, report that as ``text`` or ``json``, and export it to `output` if there is one."""
    from ..inference.export import FORMATS, export
    from ..inference.optimize import optimize_for_inference

    if output is not None and os.path.splitext(output)[1] not in FORMATS:
        raise click.UsageError(f"{output!r}: expected an OUT that ends in {' or '.join(FORMATS)}")
    net = saved_model(target)
    size = target.input_size(net)
    if optimize:
        net = optimize_for_inference(net, input_size=size)
    if report is not None:
        click.echo(json.dumps(net.se_report.to_dict()) if report == "json" else str(net.se_report))
    if output is not None:
        export(net, output, input_size=size, dynamic_batch=dynamic_batch)
        say(f"written to {output}")


@click.command("run", context_settings={"allow_interspersed_args": False})
@click.option("-m", "as_module", is_flag=True, help="SCRIPT is a module, as for python -m.")
@click.argument("script", metavar="SCRIPT")
@click.argument("args", metavar="[ARGS]...", nargs=-1, type=click.UNPROCESSED)
def run_command(script: str, args: tuple[str, ...], as_module: bool) -> None:
    """Run a Python script with the se_inject/... models in timm.

    The script needs no change. ARGS are its own, and so are its logging, its errors and its exit code.
    """
    from ..tools import run_script

    if not as_module and not os.path.isfile(script):
        raise click.UsageError(
            f"there is no script {script!r} in {os.getcwd()}: give the path of a file, or -m and the name of a module")
    run_script.run(script, args, module=as_module)


@click.command("demo")
@output_option(required=False, help="The safetensors file to write; the figure goes beside it; default a new temporary folder.")
@json_option
def demo_command(output: str | None, as_json: bool) -> None:
    """Classify photographs with and without SE, then train on digits.

    Injects EfficientNet-Lite0 with its ImageNet weights, saves it, builds it from its file, and compares the logits. Then
    trains the head alone, and blocks and head, and draws the gates.
    """
    from ..tools.demo import TRAINING_STEPS, run

    with progress_bar() as progress:
        task = progress.add_task("demonstration", total=TRAINING_STEPS)
        result = run(output, say, functools.partial(progress.advance, task))
    click.echo(json.dumps(dataclasses.asdict(result)) if as_json else str(result))
    if not result.exact:
        raise SEInjectError("the injected model's logits differ from the base's")
