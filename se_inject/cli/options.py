"""TODO"""

from __future__ import annotations

import ast
import logging
import os
from collections.abc import Callable
from typing import Any

import click

from ..config import EXISTING, INITS, PLACEMENTS, SEConfig
from ..errors import ConfigError

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


def config_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_CONFIG_OPTIONS):
        command = option(command)
    return command


class ArgumentParam(click.ParamType):
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


model_args_option = click.option(
    "--model-kwargs", multiple=True, type=ArgumentParam(),
    help="An argument for timm's model, such as img_size=64; repeatable.")


def timm_arguments(given: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    """The arguments for timm's model, which are not those of its weights: these have their own options."""
    for name, value in given:
        if name.startswith("pretrained") or name == "checkpoint_path":
            raise ConfigError(
                f"--model-kwargs {name}={value!r}: it names weights, not a model; write --pretrained, or the FILE itself")
    return dict(given)


def given_options(given: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, checked before torch is imported."""
    options = {k: v for k, v in given.items() if v is not None and v != ()}
    SEConfig.of(**options)
    return options


def say(text: str) -> None:
    logging.getLogger("se_inject").info(text)


def is_file(target: str) -> bool:
    """Whether a NAME|FILE argument is a file or folder rather than a timm name."""
    if os.path.isdir(target):
        return os.path.isfile(os.path.join(target, "config.json")) or os.sep in target
    return os.path.exists(target) or os.path.splitext(target)[1] in (".safetensors", ".pth", ".pt", ".tar", ".bin")


_EXPORT_OPTIONS = [
    click.argument("file", metavar="FILE"),
    click.option("-o", "--output", metavar="OUT", help="A file for torch.export.load (.pt2) or ONNX (.onnx)."),
    click.option("--model", metavar="NAME", help="The architecture of a FILE that does not say it."),
    model_args_option,
    click.option("--img-size", type=int, metavar="H", help="Height and width; default the model's own."),
    click.option("--dynamic-batch/--one-image", default=True, show_default=True, help="Images that OUT takes."),
]


def export_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_EXPORT_OPTIONS):
        command = option(command)
    return command


class ModelParam(click.ParamType):
    """A timm name and its arguments, separated by spaces."""

    name = "NAME [ARG=VALUE]..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, dict[str, Any]]:
        name, *words = str(value).split() or [""]
        return name, timm_arguments(tuple(ArgumentParam().convert(word, param, ctx) for word in words))
