"""TODO"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from typing import Any

import click

from ..errors import SEInjectError
from .options import config_options, given_options, is_file, model_args_option, say, timm_arguments


@click.command("list")
@click.argument("pattern", default="*")
@click.option("--pretrained", is_flag=True, help="Only names with pretrained weights, with their tags.")
@click.option("--json", "as_json", is_flag=True, help="A JSON list.")
def list_command(pattern: str, pretrained: bool, as_json: bool) -> None:
    """List the timm names that match PATTERN, as they are written for timm.create_model."""
    import timm

    from ..timm_names import PREFIX, base_name, unknown_model_message

    find = timm.list_pretrained if pretrained else timm.list_models
    names = find(PREFIX + base_name(pattern))
    if not names:
        raise click.ClickException(unknown_model_message(pattern, base_name(pattern).strip("*?")))
    click.echo(json.dumps(names) if as_json else "\n".join(names))


@click.command("plan")
@click.argument("target", metavar="NAME|FILE")
@click.option("--model", metavar="NAME", help="The architecture of a FILE that does not say it.")
@model_args_option
@click.option("--img-size", type=int, help="Height and width of the image; default the model's own.")
@click.option("--diagram", is_flag=True, help="Draw where the blocks go, each kind of unit once.")
@click.option("--json", "as_json", is_flag=True, help="The plan as JSON.")
@config_options
def plan_command(
    target: str, model: str | None, model_kwargs: tuple[tuple[str, Any], ...], img_size: int | None, diagram: bool,
    as_json: bool, **given: Any,
) -> None:  # fmt: skip
    """Show the sites that inject would fill, and those it would skip and why. Writes nothing."""
    options = given_options(given)
    from ..capture.inputs import input_sizes
    from ..surgery.pipeline import plan
    from ..timm_names import skeleton
    from ..weights.reading import read_checkpoint
    from ..weights.rebuild import base_of

    args = timm_arguments(model_kwargs)
    if is_file(target):
        found = read_checkpoint(target)
        net = base_of(dataclasses.replace(found, model_args={**found.model_args, **args}), model, target, meta=True)
    else:
        net = skeleton(target, **args)
    size = (input_sizes(net)[0][0], img_size, img_size) if img_size else None
    made = plan(net, input_size=size, **options)
    click.echo(json.dumps(made.to_dict()) if as_json else made.diagram() if diagram else str(made))
    if not made.sites:
        sys.exit(1)


@click.command("inject")
@click.argument("target", metavar="NAME|FILE")
@click.option("-o", "--output", required=True, metavar="OUT", help="The safetensors file to write.")
@click.option("--model", metavar="NAME", help="The architecture of a FILE that does not say it.")
@model_args_option
@click.option("--pretrained", is_flag=True, help="With a NAME, take timm's pretrained weights.")
@click.option("--only-se", is_flag=True, help="Write the blocks alone, to be loaded over any base weights.")
@config_options
def inject_command(
    target: str, output: str, model: str | None, model_kwargs: tuple[tuple[str, Any], ...], pretrained: bool,
    only_se: bool, **given: Any,
) -> None:  # fmt: skip
    """Put blocks into a named model or a saved one, and write weights and recipe to OUT."""
    options, args = given_options(given), timm_arguments(model_kwargs)
    from ..surgery.pipeline import inject
    from ..timm_names import skeleton
    from ..weights.files import load_found, save
    from ..weights.reading import read_checkpoint

    if is_file(target):
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
            say("random weights: add --pretrained for timm's own")
        try:
            net = timm.create_model(target.removeprefix("se_inject/"), pretrained=pretrained, **args)
        except Exception as error:
            raise SEInjectError(f"timm could not create {target!r}: {error}") from error
        inject(net, **options)
    save(net, output, only="se" if only_se else None)
    click.echo(output)


@click.command("merge")
@click.argument("file", metavar="FILE")
@click.option("--base", metavar="FILE", help="The base's weights, where FILE has none.")
@click.option("--head", metavar="FILE", help="A file whose classifier is taken instead.")
@click.option("--pretrained", is_flag=True, help="Take timm's pretrained weights for the base.")
@click.option("-o", "--output", required=True, metavar="OUT", help="The safetensors file to write.")
def merge_command(file: str, base: str | None, head: str | None, pretrained: bool, output: str) -> None:
    """Write blocks, base and head that come from several files to one: FILE is one of `inject`, or of save()."""
    from ..weights.files import load_found, save
    from ..weights.reading import read_checkpoint

    found = read_checkpoint(file)
    if found.recipe is None:
        raise SEInjectError(f"{file!r} does not say what its blocks are: `se-inject inject {file} -o OUT` first")
    save(load_found(found, file, base=base, head=head, pretrained=pretrained), output)
    click.echo(output)


@click.command("info")
@click.argument("file", metavar="FILE")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def info_command(file: str, as_json: bool) -> None:
    """Say what a file holds: architecture, recipe, blocks and parameters."""
    from ..weights.reading import read_checkpoint
    from ..weights.rebuild import said_blocks

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


@click.command("eject")
@click.argument("file", metavar="FILE")
@click.option("-o", "--output", required=True, metavar="OUT", help="The safetensors file to write.")
@click.option("--model", metavar="NAME", help="The architecture of a FILE without a recipe.")
@config_options
def eject_command(file: str, output: str, model: str | None, **given: Any) -> None:
    """Write the base weights of an injected model, as plain timm loads them, to OUT."""
    options = given_options(given)
    from ..surgery.pipeline import eject
    from ..weights.files import load_found
    from ..weights.reading import read_checkpoint
    from ..weights.recipe import description
    from ..weights.writing import write_safetensors

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
    say(f"{len(tensors)} base tensors written, {len(found.tensors) - len(tensors)} SE tensors left out")
    click.echo(output)


@click.command("to-native")
@click.argument("file", metavar="FILE")
@click.option("-o", "--output", required=True, metavar="OUT", help="The safetensors file to write.")
@click.option("--model", metavar="NAME", help="The architecture of a FILE without a recipe.")
@config_options
def to_native_command(file: str, output: str, model: str | None, **given: Any) -> None:
    """Write the weights of an injected model for timm's own model with the same attention, to OUT.

    Its name and arguments go to stdout, as JSON: plain timm loads OUT by checkpoint_path=.
    """
    options = given_options(given)
    from ..rescale.native import to_native
    from ..weights.files import load

    weights = to_native(load(file, model, **options), output)
    say(f"{len(weights)} tensors of {weights.architecture} written to {output}")
    click.echo(json.dumps({"architecture": weights.architecture, "model_args": weights.model_args, "file": output}))


def saved_model(file: str, model: str | None, model_kwargs: tuple[tuple[str, Any], ...]) -> Any:
    """The model of a file, with its blocks where it has some."""
    from ..weights.files import load_found
    from ..weights.reading import read_checkpoint
    from ..weights.rebuild import base_of, said_blocks

    found, args = read_checkpoint(file), timm_arguments(model_kwargs)
    if found.recipe is not None or said_blocks(found, file)[0]:
        return load_found(found, file, model, model_args=args)
    net = base_of(dataclasses.replace(found, model_args={**found.model_args, **args}), model, file)
    try:
        net.load_state_dict(found.tensors)
    except RuntimeError as error:
        raise SEInjectError(f"{file!r} does not fit {type(net).__name__}: {error}") from error
    return net
