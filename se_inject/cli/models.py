"""Commands that plan, write and read models: list, plan, inject, merge, info, eject, to-native."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from typing import Any

import click

from ..errors import SEInjectError
from .options import Target, config_options, file_argument, json_option, output_option, say, target


@click.command("list")
@click.argument("pattern", default="*")
@click.option("--pretrained", is_flag=True, help="Only names with pretrained weights, with their tags.")
@json_option
def list_command(pattern: str, pretrained: bool, as_json: bool) -> None:
    """List the models that match PATTERN, a timm name with * and ?.

    The names have the prefix se_inject/, as timm.create_model takes them.
    """
    import timm

    from ..timm_names import PREFIX, base_name, unknown_model_message

    find = timm.list_pretrained if pretrained else timm.list_models
    names = find(PREFIX + base_name(pattern))
    if not names:
        raise click.ClickException(unknown_model_message(pattern, base_name(pattern).strip("*?")))
    click.echo(json.dumps(names) if as_json else "\n".join(names))


@click.command("plan")
@target("NAME|FILE", img_size=True)
@click.option("--diagram", is_flag=True, help="Draw where the blocks go, each kind of unit once.")
@json_option
@config_options()
def plan_command(target: Target, diagram: bool, as_json: bool, options: dict[str, Any]) -> None:
    """Show which sites get a block, and which are skipped and why.

    Writes no file. Exits with 1 if no site gets a block.
    """
    from ..surgery.pipeline import plan
    from ..timm_names import skeleton

    if said := [key for key in target.model_args if key.startswith("se_")]:
        raise SEInjectError(f"--model-kwargs {said[0]}=...: write --{said[0][3:].replace('_', '-')}, an option of this command")
    net = _base_of(_read(target), target, meta=True) if target.is_file else skeleton(target.source, **target.model_args)
    made = plan(net, input_size=target.input_size(net), **options)
    click.echo(json.dumps(made.to_dict()) if as_json else made.diagram() if diagram else str(made))
    if not made.sites:
        sys.exit(1)


@click.command("inject")
@target("NAME|FILE")
@output_option()
@click.option("--pretrained", is_flag=True, help="With a NAME, take timm's pretrained weights.")
@click.option("--only-se", is_flag=True, help="Write only the blocks, to be loaded over any base weights.")
@click.option("--verify", is_flag=True, help="Run base and result, and write nothing where their outputs differ.")
@config_options()
def inject_command(
    target: Target, output: str, pretrained: bool, only_se: bool, verify: bool, options: dict[str, Any],
) -> None:  # fmt: skip
    """Put blocks into a model, and write it to OUT.

    OUT holds the weights and the recipe, and is enough to build the model again.
    """
    from ..surgery.pipeline import inject
    from ..timm_names import base_name, remember_args, skeleton
    from ..weights.files import load_found, save
    from ..weights.reading import read_checkpoint

    source, args = target.source, target.model_args
    if target.is_file:
        if pretrained:
            raise click.UsageError(f"--pretrained goes with a NAME, and {source!r} is a file: leave --pretrained out")
        found = read_checkpoint(source)
        if found.recipe is not None:
            raise SEInjectError(
                f"{source!r} already holds an injected model ({len(found.recipe.sites)} blocks): "
                f"`se-inject eject {source} -o BASE` first")
        net = load_found(found, source, target.model, model_args=args, verify=verify, **options)
    else:
        import timm

        skeleton(source, **args)  # raises the error for an unknown name
        if not pretrained:
            say("random weights: add --pretrained for timm's own")
        try:
            net = remember_args(timm.create_model(base_name(source), pretrained=pretrained, **args), args)
        except Exception as error:
            raise SEInjectError(f"timm could not create {source!r}: {error}") from error
        inject(net, verify=verify, **options)
    save(net, output, only="se" if only_se else None)
    click.echo(click.format_filename(output))


@click.command("merge")
@file_argument
@click.option("--base", metavar="FILE", help="A file with the base's weights, if FILE has none.")
@click.option("--head", metavar="FILE", help="A file whose classifier replaces the others'.")
@click.option("--pretrained", is_flag=True, help="Take timm's pretrained weights for the base.")
@output_option()
def merge_command(file: str, base: str | None, head: str | None, pretrained: bool, output: str) -> None:
    """Write blocks, base and head from several files to one.

    FILE was written by `inject` or by se_inject.save, and says what its blocks are.
    """
    from ..weights.files import load_found, save
    from ..weights.reading import read_checkpoint

    found = read_checkpoint(file)
    if found.recipe is None:
        raise SEInjectError(f"{file!r} does not say what its blocks are: `se-inject inject {file} -o OUT` first")
    save(load_found(found, file, base=base, head=head, pretrained=pretrained), output)
    click.echo(click.format_filename(output))


@click.command("info")
@file_argument
@json_option
def info_command(file: str, as_json: bool) -> None:
    """Show what a file holds: architecture, options, blocks, tensors."""
    from ..weights.reading import read_checkpoint
    from ..weights.rebuild import said_blocks, without_prefix

    logging.getLogger("se_inject").setLevel(logging.WARNING)  # `said_blocks` injects a model, which is no news to the user
    found = read_checkpoint(file)
    found = without_prefix(found, found.architecture, file)
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


@click.command("eject")
@target("FILE")
@output_option()
@config_options()
def eject_command(target: Target, output: str, options: dict[str, Any]) -> None:
    """Write the base weights of an injected model to OUT.

    Plain timm loads OUT. Options of the blocks are for a FILE without a recipe.
    """
    from ..surgery.pipeline import eject
    from ..weights.files import load_found
    from ..weights.reading import read_checkpoint
    from ..weights.recipe import FULL, description, parts_in_words
    from ..weights.writing import write_safetensors

    found = read_checkpoint(target.source)
    recipe = found.recipe
    if recipe is not None and recipe.content != FULL:
        raise SEInjectError(f"{target.source!r} holds the {parts_in_words(recipe.content)} alone, and no base to write")
    if recipe is not None and recipe.architecture is None:
        prefixes = tuple(f"{p}." for p in recipe.sites)
        tensors, metadata = {k: t for k, t in found.tensors.items() if not k.startswith(prefixes)}, {}
    else:
        net = load_found(found, target.source, target.model, model_args=target.model_args, **options)
        tensors, metadata = eject(net).state_dict(), description(net)
    write_safetensors(output, tensors, metadata)
    say(f"{len(tensors)} base tensors written, {len(found.tensors) - len(tensors)} SE tensors left out")
    click.echo(click.format_filename(output))


@click.command("to-native")
@target("FILE")
@output_option()
@config_options()
def to_native_command(target: Target, output: str, options: dict[str, Any]) -> None:
    """Write the weights for timm's own model with the same blocks.

    Its name and arguments go to stdout as JSON. Plain timm loads OUT with checkpoint_path=. Options of the blocks are for a
    FILE without a recipe.
    """
    from ..rescale.native import to_native
    from ..weights.files import load

    weights = to_native(load(target.source, target.model, model_args=target.model_args, **options), output)
    say(f"{len(weights)} tensors of {weights.architecture} written to {output}")
    click.echo(json.dumps({"architecture": weights.architecture, "model_args": weights.model_args, "file": output}))


def saved_model(target: Target) -> Any:
    """The model of a file, with its blocks if it has any."""
    from ..weights.files import load_found
    from ..weights.rebuild import said_blocks

    found = _read(target)
    named = dataclasses.replace(
        found, architecture=target.model or found.architecture, model_args={**found.model_args, **target.model_args})
    if found.recipe is not None or said_blocks(named, target.source)[0]:
        return load_found(found, target.source, target.model, model_args=target.model_args)
    net = _base_of(found, target)
    try:
        net.load_state_dict(found.tensors)
    except RuntimeError as error:
        raise SEInjectError(f"{target.source!r} does not fit {type(net).__name__}: {error}; name the model with --model "
                            "and --model-kwargs") from error
    return net


def _read(target: Target) -> Any:
    """The checkpoint of a target, with the names of its model."""
    from ..weights.reading import read_checkpoint
    from ..weights.rebuild import without_prefix

    found = read_checkpoint(target.source)
    return without_prefix(found, target.model or found.architecture, target.source)


def _base_of(found: Any, target: Target, meta: bool = False) -> Any:
    """The plain model that a checkpoint's weights are for, without them."""
    from ..weights.files import base_of

    found = dataclasses.replace(found, model_args={**found.model_args, **target.model_args})
    return base_of(found, target.model, target.source, meta=meta)
