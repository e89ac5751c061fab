"""The command `se-inject`. Read `options` first; `models`, `programs` and `measure` hold the commands.

Results go to stdout and messages to stderr, so that the output can be piped. Exit codes: 0 success, 1 failure, 2 wrong usage.
Each command imports torch by itself, so that ``--help`` does not.
"""

from __future__ import annotations

import logging
from typing import Any

import click

from ..errors import ConfigError, SEInjectError
from .measure import bench_command, gates_command, zoo_command
from .models import (
    eject_command,
    info_command,
    inject_command,
    list_command,
    merge_command,
    plan_command,
    to_native_command,
)
from .programs import demo_command, export_command, optimize_command, run_command


class _Group(click.Group):
    """A group that turns se_inject's errors into click's."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            raise click.UsageError(str(error)) from error
        except SEInjectError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="se-inject", prog_name="se-inject")
@click.option("-q", "--quiet", is_flag=True, help="No messages on stderr.")
@click.pass_context
def main(ctx: click.Context, quiet: bool) -> None:
    """Put squeeze-and-excitation into any timm model, and keep its pretrained weights."""
    logger = logging.getLogger("se_inject")
    if ctx.invoked_subcommand == "run":  # the script configures logging by itself
        if quiet:
            logger.setLevel(logging.WARNING)
        return
    logger.handlers[:] = [_ToStderr()]
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.propagate = False


class _ToStderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        click.echo(record.getMessage(), err=True)


for _command in (
    list_command, plan_command, inject_command, merge_command, info_command, eject_command, to_native_command,
    optimize_command, export_command, run_command, zoo_command, bench_command, gates_command,
    demo_command,
):
    main.add_command(_command)
