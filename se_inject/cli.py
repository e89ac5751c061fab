"""The command: `se-inject list | plan | inject | merge | info | eject | to-native | optimize | export |
run | zoo | bench | demo`.

Results go to stdout and talk to stderr, so that output pipes. Exit codes: 0 done, 1 it could not be
done, 2 it was asked wrongly. torch is imported by the commands that need it, not by ``--help``.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click

from . import __version__
from .config import EXISTING, INITS, PLACEMENTS, SEConfig
from .errors import ConfigError, SEInjectError


class _Group(click.Group):
    """A group that turns se_inject's errors into click's, and says which command was meant."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            raise click.UsageError(str(error)) from error
        except SEInjectError as error:
            raise click.ClickException(str(error)) from error


_CONFIG_OPTIONS = [
    click.option("--ratio", type=float, help="Squeeze width over channels, in (0, 1]; default 1/16."),
    click.option("--rd-channels", type=int, help="A fixed squeeze width, instead of --ratio."),
    click.option("--rd-divisor", type=int, help="Round the width to a multiple of this; default 8."),
    click.option("--placement", type=click.Choice(PLACEMENTS), help="Where in the branch; default auto."),
    click.option("--block", help="The gate; default se."),
    click.option("--init", type=click.Choice(INITS), help="identity keeps the outputs bit-exact; default identity."),
    click.option("--act-layer", help="Activation between the two layers, by timm's name."),
    click.option("--gate-layer", help="Gate function, by timm's name."),
    click.option("--bias/--no-bias", default=None, help="Bias in the two layers; default yes."),
    click.option("--stages", type=int, multiple=True, help="Only these stages, as timm's out_indices; repeatable."),
    click.option("--include", multiple=True, metavar="GLOB", help="Only sites whose path matches; repeatable."),
    click.option("--exclude", multiple=True, metavar="GLOB", help="No site whose path matches; repeatable."),
    click.option("--min-channels", type=int, help="Only sites with at least this many channels."),
    click.option("--existing", type=click.Choice(EXISTING), help="Where there is channel attention; default skip."),
]


def _config_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_CONFIG_OPTIONS):
        command = option(command)
    return command


class _Argument(click.ParamType):
    """NAME=VALUE, the value as Python writes it, or else a word; as timm's scripts take them."""

    name = "NAME=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        name, equals, text = str(value).partition("=")
        if not equals or not name.isidentifier():
            self.fail(f"{value!r}: expected NAME=VALUE, such as img_size=64", param, ctx)
        try:
            return name, ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return name, text


_model_args = click.option(
    "--model-kwargs", multiple=True, type=_Argument(), help="An argument for timm's model, such as img_size=64; repeatable.")


def _arguments(given: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    """The arguments for timm's model, which are not those of its weights: these have their own options."""
    for name, value in given:
        if name.startswith("pretrained") or name == "checkpoint_path":
            raise ConfigError(
                f"--model-kwargs {name}={value!r}: it names weights, not a model; write --pretrained, or the FILE itself")
    return dict(given)


def _options(given: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, checked before torch is imported."""
    options = {k: v for k, v in given.items() if v is not None and v != ()}
    SEConfig.of(**options)
    return options


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="se-inject")
@click.option("-q", "--quiet", is_flag=True, help="No talk on stderr.")
@click.pass_context
def main(ctx: click.Context, quiet: bool) -> None:
    """Put squeeze-and-excitation into any timm model, and keep its pretrained weights."""
    logger = logging.getLogger("se_inject")
    if ctx.invoked_subcommand == "run":  # a script's own logging takes the lines where it wants them
        if quiet:
            logger.setLevel(logging.WARNING)
        return
    logger.handlers[:] = [_Talk()]
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.propagate = False


class _Talk(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        click.echo(record.getMessage(), err=True)


def _say(text: str) -> None:
    logging.getLogger("se_inject").info(text)


def _is_file(target: str) -> bool:
    """Whether a NAME|FILE argument is a file or folder rather than a timm name."""
    if os.path.isdir(target):
        return os.path.isfile(os.path.join(target, "config.json")) or os.sep in target
    return os.path.exists(target) or os.path.splitext(target)[1] in (".safetensors", ".pth", ".pt", ".tar", ".bin")


@main.command("list")
@click.argument("pattern", default="*")
@click.option("--pretrained", is_flag=True, help="Only names with pretrained weights, with their tags.")
@click.option("--json", "as_json", is_flag=True, help="A JSON list.")
def list_command(pattern: str, pretrained: bool, as_json: bool) -> None:
    """List the timm names that match PATTERN, as they are written for timm.create_model."""
    import timm

    from .naming import PREFIX, base_name
    from .surgery import unknown_model_message

    find = timm.list_pretrained if pretrained else timm.list_models
    names = find(PREFIX + base_name(pattern))
    if not names:
        raise click.ClickException(unknown_model_message(pattern, base_name(pattern).strip("*?")))
    click.echo(json.dumps(names) if as_json else "\n".join(names))


@main.command("plan")
@click.argument("target", metavar="NAME|FILE")
@click.option("--model", metavar="NAME", help="The architecture of a FILE that does not say it.")
@_model_args
@click.option("--img-size", type=int, help="Height and width of the image; default the model's own.")
@click.option("--diagram", is_flag=True, help="Draw where the blocks go, each kind of unit once.")
@click.option("--json", "as_json", is_flag=True, help="The plan as JSON.")
@_config_options
def plan_command(
    target: str, model: str | None, model_kwargs: tuple[tuple[str, Any], ...], img_size: int | None, diagram: bool,
    as_json: bool, **given: Any,
) -> None:  # fmt: skip
    """Show the sites that inject would fill, and those it would skip and why. Writes nothing."""
    options = _options(given)
    from .checkpoint import read_checkpoint
    from .surgery import input_sizes, plan, skeleton
    from .weights import base_of

    args = _arguments(model_kwargs)
    if _is_file(target):
        found = read_checkpoint(target)
        net = base_of(dataclasses.replace(found, model_args={**found.model_args, **args}), model, target, meta=True)
    else:
        net = skeleton(target, **args)
    size = (input_sizes(net)[0][0], img_size, img_size) if img_size else None
    made = plan(net, input_size=size, **options)
    click.echo(json.dumps(made.to_dict()) if as_json else made.diagram() if diagram else str(made))
    if not made.sites:
        sys.exit(1)


@main.command("inject")
@click.argument("target", metavar="NAME|FILE")
@click.option("-o", "--output", required=True, metavar="OUT", help="The safetensors file to write.")
@click.option("--model", metavar="NAME", help="The architecture of a FILE that does not say it.")
@_model_args
@click.option("--pretrained", is_flag=True, help="With a NAME, take timm's pretrained weights.")
@click.option("--only-se", is_flag=True, help="Write the blocks alone, to be loaded over any base weights.")
@_config_options
def inject_command(
    target: str, output: str, model: str | None, model_kwargs: tuple[tuple[str, Any], ...], pretrained: bool,
    only_se: bool, **given: Any,
) -> None:  # fmt: skip
    """Put blocks into a named model or a saved one, and write weights and recipe to OUT."""
    options, args = _options(given), _arguments(model_kwargs)
    from .checkpoint import read_checkpoint
    from .surgery import inject, skeleton
    from .weights import load_found, save

    if _is_file(target):
        found = read_checkpoint(target)
        if found.recipe is not None:
            raise SEInjectError(
                f"{target!r} already holds an injected model ({len(found.recipe.sites)} blocks): "
                f"`se-inject eject {target} -o BASE` first")
        net = load_found(found, target, model, model_args=args, **options)
    else:
        import timm

        skeleton(target, **args)  # a wrong name gets its error here
        if not pretrained:
            _say("random weights: add --pretrained for timm's own")
        try:
            net = timm.create_model(target.removeprefix("se_inject/"), pretrained=pretrained, **args)
        except Exception as error:
            raise SEInjectError(f"timm could not create {target!r}: {error}") from error
        inject(net, **options)
    save(net, output, only="se" if only_se else None)
    click.echo(output)


@main.command("merge")
@click.argument("file", metavar="FILE")
@click.option("--base", metavar="FILE", help="The base's weights, where FILE has none.")
@click.option("--head", metavar="FILE", help="A file whose classifier is taken instead.")
@click.option("--pretrained", is_flag=True, help="Take timm's pretrained weights for the base.")
@click.option("-o", "--output", required=True, metavar="OUT", help="The safetensors file to write.")
def merge_command(file: str, base: str | None, head: str | None, pretrained: bool, output: str) -> None:
    """Write blocks, base and head that come from several files to one: FILE is one of `inject`, or of save()."""
    from .checkpoint import read_checkpoint
    from .weights import load_found, save

    found = read_checkpoint(file)
    if found.recipe is None:
        raise SEInjectError(f"{file!r} does not say what its blocks are: `se-inject inject {file} -o OUT` first")
    save(load_found(found, file, base=base, head=head, pretrained=pretrained), output)
    click.echo(output)


@main.command("info")
@click.argument("file", metavar="FILE")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def info_command(file: str, as_json: bool) -> None:
    """Say what a file holds: architecture, recipe, blocks and parameters."""
    from .checkpoint import read_checkpoint
    from .weights import said_blocks

    logging.getLogger("se_inject").setLevel(logging.WARNING)  # nothing is injected that the caller knows of
    found = read_checkpoint(file)
    recipe = found.recipe
    sites, configs = (recipe.sites, recipe.configs) if recipe else said_blocks(found, file)
    prefixes = tuple(f"{p}." for p in sites)
    se = {k for k in found.tensors if k.startswith(prefixes)}
    data: dict[str, Any] = {
        "file": file,
        "architecture": found.architecture,
        "model_args": found.model_args,
        "content": recipe.content if recipe else "full" if se else "base",
        "configs": [c.to_dict() for c in configs],
        "sites": list(sites),
        "tensors": {"base": len(found.tensors) - len(se), "se": len(se)},
        "values": {
            "base": sum(t.numel() for k, t in found.tensors.items() if k not in se),
            "se": sum(found.tensors[k].numel() for k in se)},
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in found.tensors.values()}),
    }  # fmt: skip
    if as_json:
        click.echo(json.dumps(data))
        return
    click.echo(f"architecture: {data['architecture'] or 'not said'}  {json.dumps(data['model_args'])}")
    click.echo(f"content: {data['content']}, {len(found.tensors)} tensors ({', '.join(data['dtypes'])})")
    click.echo(f"base: {len(found.tensors) - len(se)} tensors, {data['values']['base']:,} values")
    click.echo(f"blocks: {len(data['sites'])}, {len(se)} tensors, {data['values']['se']:,} values")
    for config in data["configs"]:
        click.echo(f"options: {json.dumps(config)}")


@main.command("eject")
@click.argument("file", metavar="FILE")
@click.option("-o", "--output", required=True, metavar="OUT", help="The safetensors file to write.")
@click.option("--model", metavar="NAME", help="The architecture of a FILE without a recipe.")
@_config_options
def eject_command(file: str, output: str, model: str | None, **given: Any) -> None:
    """Write the base weights of an injected model, as plain timm loads them, to OUT."""
    options = _options(given)
    from .checkpoint import read_checkpoint
    from .recipe import description
    from .surgery import eject
    from .weights import load_found
    from .writing import write_safetensors

    found = read_checkpoint(file)
    if any(c.existing == "replace" for c in (found.recipe.configs if found.recipe else ())):
        raise SEInjectError(f"{file!r}: its blocks replaced the base's own attention, whose weights it does not hold")
    if found.recipe is not None and found.recipe.architecture is None:
        prefixes = tuple(f"{p}." for p in found.recipe.sites)
        tensors, said = {k: t for k, t in found.tensors.items() if not k.startswith(prefixes)}, {}
    else:
        net = eject(load_found(found, file, model, **options))
        tensors, said = net.state_dict(), description(net)
    write_safetensors(output, tensors, said)
    _say(f"{len(tensors)} base tensors written, {len(found.tensors) - len(tensors)} SE tensors left out")
    click.echo(output)


@main.command("to-native")
@click.argument("file", metavar="FILE")
@click.option("-o", "--output", required=True, metavar="OUT", help="The safetensors file to write.")
@click.option("--model", metavar="NAME", help="The architecture of a FILE without a recipe.")
@_config_options
def to_native_command(file: str, output: str, model: str | None, **given: Any) -> None:
    """Write the weights of an injected model for timm's own model with the same attention, to OUT.

    Its name and arguments go to stdout, as JSON: plain timm loads OUT by checkpoint_path=.
    """
    options = _options(given)
    from .native import to_native
    from .weights import load

    weights = to_native(load(file, model, **options), output)
    _say(f"{len(weights)} tensors of {weights.architecture} written to {output}")
    click.echo(json.dumps({"architecture": weights.architecture, "model_args": weights.model_args, "file": output}))


def _saved(file: str, model: str | None, model_kwargs: tuple[tuple[str, Any], ...]) -> Any:
    """The model of a file, with its blocks where it has some."""
    from .checkpoint import read_checkpoint
    from .weights import base_of, load_found, said_blocks

    found, args = read_checkpoint(file), _arguments(model_kwargs)
    if found.recipe is not None or said_blocks(found, file)[0]:
        return load_found(found, file, model, model_args=args)
    net = base_of(dataclasses.replace(found, model_args={**found.model_args, **args}), model, file)
    try:
        net.load_state_dict(found.tensors)
    except RuntimeError as error:
        raise SEInjectError(f"{file!r} does not fit {type(net).__name__}: {error}") from error
    return net


_export_options = [
    click.argument("file", metavar="FILE"),
    click.option("-o", "--output", metavar="OUT", help="A file for torch.export.load (.pt2) or ONNX (.onnx)."),
    click.option("--model", metavar="NAME", help="The architecture of a FILE that does not say it."),
    _model_args,
    click.option("--img-size", type=int, metavar="H", help="Height and width; default the model's own."),
    click.option("--dynamic-batch/--one-image", default=True, show_default=True, help="Images that OUT takes."),
]


def _takes_export_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_export_options):
        command = option(command)
    return command


@main.command("optimize")
@_takes_export_options
@click.option("--json", "as_json", is_flag=True, help="What was done, as JSON.")
def optimize_command(
    file: str, output: str | None, model: str | None, model_kwargs: tuple[tuple[str, Any], ...], img_size: int | None,
    dynamic_batch: bool, as_json: bool,
) -> None:  # fmt: skip
    """Make a saved model quicker for inference, say what was done, and write it to OUT as a program, where that is given.

    FILE may hold an injected model, one of timm's with SE, or one without.
    """
    _export(file, output, model, model_kwargs, img_size, dynamic_batch, True, as_json)


@main.command("export")
@_takes_export_options
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
    from .export import FORMATS, export
    from .inference import optimize_for_inference
    from .surgery import input_sizes

    if output is not None and os.path.splitext(output)[1] not in FORMATS:
        raise click.UsageError(f"{output!r}: OUT ends in {' or '.join(FORMATS)}")
    net = _saved(file, model, model_kwargs)
    size = (input_sizes(net)[0][0], img_size, img_size) if img_size else None
    if optimize:
        net = optimize_for_inference(net, input_size=size)
    if as_json is not None:
        click.echo(json.dumps(net.se_report.to_dict()) if as_json else str(net.se_report))
    if output is not None:
        export(net, output, input_size=size, dynamic_batch=dynamic_batch)
        _say(f"written to {output}")


@main.command("run", context_settings={"allow_interspersed_args": False})
@click.option("-m", "as_module", is_flag=True, help="SCRIPT is a module, as for python -m.")
@click.argument("script", metavar="SCRIPT")
@click.argument("args", metavar="[ARGS]...", nargs=-1, type=click.UNPROCESSED)
def run_command(script: str, args: tuple[str, ...], as_module: bool) -> None:
    """Run a Python script that knows nothing of se_inject, with "se_inject/..." among timm's models.

    ARGS are the script's own, and so are its logging, its errors and its exit code.
    """
    from . import script as scripts

    if not as_module and not os.path.isfile(script):
        raise click.UsageError(f"there is no script {script!r} in {os.getcwd()}: give its file, or -m and a module's name")
    scripts.run(script, args, module=as_module)


@main.command("zoo")
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

    from . import zoo

    found: dict[str, None] = {}
    for pattern in patterns or ("*",):
        matches = zoo.names(pattern)
        if not matches:
            raise click.ClickException(f"no model matches {pattern!r}; `se-inject list` has timm's names")
        found.update(dict.fromkeys(matches))
    names = list(found)
    expected = zoo.read(check) if check else []
    if check and not expected:
        raise click.ClickException(f"{check!r} holds no rows to check against; make it with --out {check}")
    there = [r for r in (zoo.read(out) if out else []) if r.status != "failed"]
    wanted = set(names)
    keep = [r for r in there if r.model in wanted and r.placement == placement]
    if keep:
        _say(f"{len(keep)} of {len(names)} rows kept from {out}")
    table = zoo.Table(out, there)
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
        zoo.write_page(page, rows, f"se-inject zoo {asked} --placement {placement} --verify {verify}")
    by_status = {s: sum(r.status == s for r in rows) for s in ("injected", "refused", "failed")}
    click.echo(f"{len(rows)} models: " + ", ".join(f"{n} {s}" for s, n in by_status.items()))
    changed = zoo.differences(rows, expected) if check else []
    for line in changed:
        click.echo(line)
    if changed or by_status["failed"]:
        sys.exit(1)


class _Model(click.ParamType):
    """A timm name and its arguments, separated by spaces."""

    name = "NAME [ARG=VALUE]..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, dict[str, Any]]:
        name, *words = str(value).split() or [""]
        return name, _arguments(tuple(_Argument().convert(word, param, ctx) for word in words))


@main.command("bench")
@click.argument("names", metavar="NAME...", nargs=-1)
@click.option("--measure", type=click.Choice(["inference", "training", "surgery", "loading"]), default="inference",
              show_default=True, help="What is timed; surgery is the injection itself.")  # fmt: skip
@click.option("--vs", "others", type=_Model(), multiple=True,
              help="Another timm model beside the base, such as 'se_inject/resnet50 se_block=eca'; repeatable.")  # fmt: skip
@_model_args
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
@_config_options
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
    options, args = _options(given), _arguments(model_kwargs)
    if bool(names) == bool(page):
        raise click.UsageError("expected one or more NAMEs, such as resnet50, or --write PAGE")
    if page:
        _rewrite(page, tables, rounds)
        return
    from . import bench_report
    from .bench import Settings, bench

    settings = Settings(
        batches or (8 if measure == "training" else 1,), dtypes or ("float32",), size, threads, device, channels_last, compiled,
        native, rounds, min_time)
    talks = logging.getLogger("se_inject").isEnabledFor(logging.INFO)
    say = functools.partial(click.echo, err=True) if talks else lambda text: None
    report = bench(names, measure, SEConfig.of(**options), args, others, settings, say)
    click.echo(json.dumps(report.to_dict()) if as_json else
               bench_report.markdown(report) if markdown else bench_report.text(report))  # fmt: skip


def _rewrite(page: str, tables: tuple[str, ...], rounds: int | None) -> None:
    """Each table in a process of its own, whose memory is as at the start."""
    import subprocess

    from .bench_report import rewrite

    def run(words: Sequence[str]) -> str:
        more = [] if rounds is None else ["--rounds", str(rounds)]
        command = [sys.executable, "-m", "se_inject", "bench", *words, *more, "--markdown"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SEInjectError(f"{page!r}: se-inject bench {shlex.join(words)} failed; that table is as it was")
        return done.stdout

    click.echo(", ".join(rewrite(page, run, tables)))


@main.command("demo")
@click.option("-o", "--output", default="tf_efficientnet_lite0_se.safetensors", show_default=True, metavar="OUT",
              help="The safetensors file to write.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="The predictions as JSON.")
def demo_command(output: str, as_json: bool) -> None:
    """Inject EfficientNet-Lite0 with its ImageNet weights, and classify photographs before and after."""
    from .demo import run

    result = run(output, _say)
    click.echo(json.dumps([dataclasses.asdict(p) for p in result.photos]) if as_json else str(result))
    if not result.exact:
        raise SEInjectError("the injected model's logits differ from the base's")
