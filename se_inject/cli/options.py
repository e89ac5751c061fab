"""Arguments and options that several commands take, each written once.

Two decorators gather options into one argument of the command: `target` into a `Target`, which says what to work on, and
`config_options` into a dict of `SEConfig` fields. torch is not imported here, so that `--help` and wrong options are quick.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Collection
from typing import Any

import click

from ..config import EXISTING, INITS, PLACEMENTS, SEConfig
from ..errors import ConfigError

Command = Callable[..., Any]
Decorator = Callable[[Command], Command]


class ArgumentParam(click.ParamType):
    """NAME=VALUE as in timm's scripts: the value is a Python literal, or else a string."""

    name = "NAME=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        name, equals, text = str(value).partition("=")
        if not equals or not name.isidentifier():
            self.fail(f"{value!r}: expected NAME=VALUE, such as img_size=64", param, ctx)
        try:
            return name, ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return name, text


class ModelParam(click.ParamType):
    """A timm name and arguments, separated by spaces."""

    name = "NAME [ARG=VALUE]..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, dict[str, Any]]:
        name, *words = str(value).split() or [""]
        return name, _model_args(ctx, param, tuple(ArgumentParam().convert(word, param, ctx) for word in words))


def _model_args(ctx: object, param: object, given: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    """Arguments of `timm.create_model`. Those that name weights are refused: weights have options of their own."""
    for name, value in given:
        if name.startswith("pretrained") or name == "checkpoint_path":
            raise ConfigError(
                f"--model-kwargs {name}={value!r}: it names weights, not a model; write --pretrained, or the FILE itself")
    return dict(given)


def output_option(required: bool = True, help: str = "The safetensors file to write.") -> Decorator:
    return click.option("-o", "--output", required=required, metavar="OUT", help=help)


file_argument = click.argument("file", metavar="FILE")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_img_size_option = click.option(
    "--img-size", type=click.IntRange(1), metavar="H", help="Height and width of the images; default the model's own.")
model_args_option = click.option(
    "--model-kwargs", "model_args", multiple=True, type=ArgumentParam(), callback=_model_args,
    help="An argument of timm's model, such as img_size=64; repeatable.")
_model_option = click.option("--model", metavar="NAME", help="The timm name of a FILE that does not hold it.")

_CONFIG_OPTIONS = {
    "ratio": click.option("--ratio", type=float, help="Squeeze width over channels, in (0, 1]; default 1/16."),
    "rd_channels": click.option("--rd-channels", type=int, help="A fixed squeeze width, instead of --ratio."),
    "rd_divisor": click.option("--rd-divisor", type=int, help="Round the width to a multiple of this; default 8."),
    "placement": click.option("--placement", type=click.Choice(PLACEMENTS), help="Where in the branch; default auto."),
    "block": click.option("--block", help="The kind of block; default se."),
    "init": click.option("--init", type=click.Choice(INITS), help="identity keeps the outputs bit-exact; default identity."),
    "act_layer": click.option("--act-layer", help="Activation between the two layers, by timm's name."),
    "gate_layer": click.option("--gate-layer", help="Gate function, by timm's name."),
    "bias": click.option("--bias/--no-bias", default=None, help="Bias in the two layers; default yes."),
    "stages": click.option("--stages", type=int, multiple=True, help="Only these stages, as timm's out_indices; repeatable."),
    "include": click.option("--include", multiple=True, metavar="GLOB", help="Only sites whose path matches; repeatable."),
    "exclude": click.option("--exclude", multiple=True, metavar="GLOB", help="No site whose path matches; repeatable."),
    "min_channels": click.option("--min-channels", type=int, help="Only sites with at least this many channels."),
    "existing": click.option("--existing", type=click.Choice(EXISTING), help="Where there is channel attention; default skip."),
}  # fmt: skip


def config_options(*names: str) -> Decorator:
    """The options of an injection, or only those named. The command gets `options`, a dict of those that were set."""
    chosen = {name: _CONFIG_OPTIONS[name] for name in names or _CONFIG_OPTIONS}

    def gather(values: dict[str, Any]) -> dict[str, Any]:
        given = {name: values.pop(name) for name in chosen}
        options = {name: value for name, value in given.items() if value is not None and value != ()}
        SEConfig.of(**options)  # a wrong value is an error before torch is imported
        return options

    return _gathered("options", gather, chosen.values())


@dataclasses.dataclass(frozen=True)
class Target:
    """The model that a command works on.

    Attributes:
        source: A timm name or a file; for some commands only a file.
        model: The timm name of a file that does not hold it.
        model_args: Arguments of `timm.create_model`.
        img_size: Height and width of the images; None is the model's own.
    """

    source: str
    model: str | None
    model_args: dict[str, Any]
    img_size: int | None = None

    @property
    def is_file(self) -> bool:
        """Whether `source` is a file or a folder rather than a timm name."""
        if os.path.isdir(self.source):
            return os.path.isfile(os.path.join(self.source, "config.json")) or os.sep in self.source
        return os.path.exists(self.source) or self.source.endswith(
            (".safetensors", ".safetensors.index.json", ".pth", ".pt", ".ckpt", ".tar", ".bin"))

    def input_size(self, model: Any) -> tuple[int, ...] | None:
        """The (C, H, W) for `img_size`, with the channels of the model."""
        from ..capture.inputs import input_sizes

        return None if self.img_size is None else (input_sizes(model)[0][0], self.img_size, self.img_size)


def target(metavar: str, img_size: bool = False) -> Decorator:
    """The model to work on. The command gets `target`, a `Target`.

    Args:
        metavar: ``FILE`` or ``NAME|FILE``.
        img_size: Whether there is an option ``--img-size``.
    """
    options = [click.argument("source", metavar=metavar), _model_option, model_args_option]
    if img_size:
        options.append(_img_size_option)
    fields = [f.name for f in dataclasses.fields(Target)]

    def gather(values: dict[str, Any]) -> Target:
        found = Target(**{name: values.pop(name) for name in fields if name in values})
        if found.model is not None and not found.is_file and metavar != "FILE":
            raise click.UsageError(f"--model goes with a FILE, and {found.source!r} is a NAME: leave one out")
        return found

    return _gathered("target", gather, options)


def _gathered(name: str, gather: Callable[[dict[str, Any]], object], options: Collection[Decorator]) -> Decorator:
    """Give a command `options`, and pass their values as one argument, which `gather` takes out of all values."""

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def wrapper(**values: Any) -> Any:
            gathered = gather(values)
            return command(**values, **{name: gathered})

        decorated: Command = wrapper
        for option in reversed(list(options)):
            decorated = option(decorated)
        return decorated

    return decorate


def say(text: str) -> None:
    """Write a line to stderr, unless `--quiet` is set."""
    logging.getLogger("se_inject").info(text)


def progress_bar() -> Any:
    """A progress bar on stderr, unless `--quiet` is set."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, disable=not talks())


def talks() -> bool:
    return logging.getLogger("se_inject").isEnabledFor(logging.INFO)
