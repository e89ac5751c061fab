"""`plan`, `inject` and `eject`: the path of one call, from a model and its options to the same model with blocks."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..blocks.build import problem
from ..capture.example import Inputs, asked
from ..capture.snapshot import all_or_nothing
from ..config import SEConfig
from ..dataflow.module_graph import TracedModel
from ..errors import ConfigError, SEInjectError
from ..find.places import PlacedSite
from ..find.plan import Plan, without_match
from ..find.sites import find_sites
from ..site import Site
from ..timm_names import architecture_of, rename, skeleton
from ..undo import entered, surgery_lock
from .edits import apply_edits, undo_edits
from .freezing import unfreeze_base
from .initializing import init_weights
from .jobs import Job, make_block_for, owner_jobs
from .layer_decay import group_matcher
from .load_hooks import register_hooks, remove_hooks
from .refusals import no_sites, refuse, refuse_changed_owners
from .save_pretrained import save_pretrained
from .session import copied, traced
from .state import (
    Injection,
    edited_owners,
    edits_of,
    injections_of,
    replaced_modules,
    set_injections,
    slots_of,
)
from .verify import check_outputs

_logger = logging.getLogger("se_inject")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A plan with everything made that `apply` needs, so that `apply` cannot fail halfway."""

    plan: Plan
    jobs: tuple[Job, ...]
    inputs: Inputs = None  # where they were asked for


def plan(
    model: nn.Module | str, config: SEConfig | dict[str, Any] | None = None, *,
    input_size: tuple[int, ...] | None = None, example_inputs: Any = None, **options: Any,
) -> Plan:  # fmt: skip
    """Show which sites `inject` would fill, and which it would skip and why. Changes nothing.

    Args:
        model: A model, or a timm name; for a name no memory is taken for weights.
        config: An `SEConfig` or a dict of its fields.
        input_size: (C, H, W) to run the model on, without computing; None is the model's own.
        example_inputs: What to run the model on instead: a tensor, a tuple of arguments, or a dict of keyword arguments. Shapes
            and data types matter, on any device; values are not read.
        **options: Fields of `SEConfig`, on top of `config`.

    Returns:
        The plan. It may have no sites; ``print(plan)`` is a table, ``print(plan.diagram())`` a drawing.

    Raises:
        ConfigError: An option is wrong, or timm does not have the name.
        TraceError: The model cannot be run on the input size, or is wrapped, compiled or scripted.

    Shape: the model takes images (N, C, H, W).

    Source: Hu et al., Squeeze-and-Excitation Networks, arXiv 1709.01507, section 3 and Table 14.

    Example:
        >>> import se_inject
        >>> print(se_inject.plan("test_resnet", stages=(3, 4)))
        site         kind      layout  stage  channels   size  squeeze  params
        layer3.0.se  residual  NCHW        3       192  10x10       16   6,352
        layer4.0.se  residual  NCHW        4        96    5x5        8   1,640
        layer1.0.se  skipped: stage 1 is not in stages=[3, 4]
        layer2.0.se  skipped: stage 2 is not in stages=[3, 4]
        test_resnet: 2 sites, 2 skipped; 469,688 + 7,992 parameters (+1.7%), 103 + 0.03 M multiply-adds at 3x160x160
    """
    config = SEConfig.of(config, **options)
    name = model if isinstance(model, str) else _model_name(model)
    if isinstance(model, str):
        model = skeleton(model)
    return prepare(model, config, asked(input_size, example_inputs), name, what="plan", drawn=True).plan


def inject(
    model: nn.Module, config: SEConfig | dict[str, Any] | None = None, *,
    input_size: tuple[int, ...] | None = None, example_inputs: Any = None, verify: bool = False, **options: Any,
) -> nn.Module:  # fmt: skip
    """Put blocks into `model`, in place, and return it. On any error the model is as it was.

    Base weights keep their names and values, and ``training`` flags stay. With ``init="identity"`` the outputs are
    bit-exact until the blocks are trained. New parameters have the device and dtype of the weights around them. An
    optimizer that was made before does not have the new parameters: add `se_parameters(model, optimizer)` to it.

    Args:
        model: A model; changed in place.
        config: An `SEConfig` or a dict of its fields.
        input_size: (C, H, W) to run the model on, without computing; None is the model's own.
        example_inputs: What to run the model on instead: a tensor, a tuple of arguments, or a dict of keyword arguments. Shapes
            and data types matter, on any device; values are not read.
        verify: Whether to run copies of the base and of the injected model on random images, in both modes, and to undo the
            injection where their outputs are not equal. Use it for models of your own.
        **options: Fields of `SEConfig`, on top of `config`.

    Returns:
        The model itself.

    Raises:
        NoSitesError: There is no site, or all are skipped; the message gives the reasons.
        ConfigError: An option is wrong.
        TraceError: The model cannot be run on the input size, or is wrapped, compiled or scripted.
        SEInjectError: With `verify`, outputs differ; the message names the first module whose output does.

    Shape: the model takes images (N, C, H, W), and its outputs keep their shapes.

    Source: Hu et al., Squeeze-and-Excitation Networks, arXiv 1709.01507.

    Example:
        >>> import se_inject, timm, torch
        >>> model, images = timm.create_model("test_resnet").eval(), torch.randn(2, 3, 160, 160)
        >>> before = model(images)
        >>> model = se_inject.inject(model, ratio=1 / 8)
        >>> torch.equal(model(images), before), len(se_inject.block_paths(model))
        (True, 4)
    """
    if isinstance(model, str):
        raise ConfigError(
            f"inject({model!r}) needs a model; write timm.create_model('se_inject/{model}') to make one by name")
    config = SEConfig.of(config, **options)
    return apply(model, prepare(model, config, asked(input_size, example_inputs), _model_name(model)), verify=verify)


def apply(model: nn.Module, prepared: Prepared, *, verify: bool = False) -> nn.Module:
    """Put the blocks of `prepare` into `model`, in place, and return it. On any error the model is as it was.

    Raises:
        NoSitesError: There is no site, or all are skipped.
        SEInjectError: With `verify`, outputs differ.
    """
    config = prepared.plan.config
    if not prepared.jobs:
        raise no_sites(model, prepared.plan)
    replaced = [key for s in prepared.plan.sites for key in s.replaces]
    if verify and replaced:
        raise ConfigError("verify=True with existing='replace': the outputs change with the attention that goes; leave out one")
    base = None
    if verify:
        refuse(model, "inject(verify=True)", values=True)
        base = copied(model, "inject(verify=True)")
    with entered(surgery_lock), all_or_nothing(model):  # the lock, as a fork waits until the random numbers are drawn
        with entered(torch.inference_mode(False)):  # whose tensors could not be trained or loaded into
            blocks: list[dict[str, nn.Module]] = [
                {s.site.slot: make_block_for(s, job.module, model, config) for s in job.found} for job in prepared.jobs
            ]
        for job, named in zip(prepared.jobs, blocks):
            apply_edits(job.module, job.edits, job.code, named)
        _attach(model)
        if base is not None:
            factors = {s.site.path: s.gain for job in prepared.jobs for s in job.found}
            check_outputs(base, copied(model, "inject(verify=True)"), factors, prepared.inputs, prepared.plan.input_size)
        set_injections(model, (*injections_of(model), Injection(config, prepared.plan.sites, prepared.inputs)))
        rename(model, injected=True)
    if replaced:
        _logger.info("%d base tensors replaced: %s", len(replaced), ", ".join(replaced))
    added = [p for named in blocks for block in named.values() for p in block.parameters()]
    _logger.info("%d blocks injected, with %s parameters", sum(map(len, blocks)), f"{sum(p.numel() for p in added):,}")
    if any(p.grad is not None for p in model.parameters()):
        _logger.warning(
            "the model has gradients: an optimizer made before the injection does not have the %d new parameters: "
            'optimizer.add_param_group({"params": se_inject.se_parameters(model, optimizer)})', len(added))
    return model


_METHODS: dict[str, Callable[..., Any]] = {  # of timm's models, and of those of transformers
    "group_matcher": group_matcher, "init_weights": init_weights, "save_pretrained": save_pretrained}


def _attach(model: nn.Module) -> None:
    """Let the methods of a model that read or write all its weights know the blocks."""
    register_hooks(model)
    for name, method in _METHODS.items():
        if hasattr(type(model), name):
            model.__dict__[name] = functools.partial(method, model)


def adopt(model: nn.Module, injected: nn.Module) -> None:
    """Let a model that is made of modules of an injected one know its blocks, in place: a feature wrapper of timm."""
    paths = {m: path for path, m in model.named_modules()}
    moved = []
    for injection in injections_of(injected):
        sites = [(s, paths.get(injected.get_submodule(s.path))) for s in injection.sites]
        there = [dataclasses.replace(s, path=path, owner=path.rpartition(".")[0]) for s, path in sites if path is not None]
        moved.append(dataclasses.replace(injection, sites=tuple(there)))
    set_injections(model, tuple(moved))
    _attach(model)


def _detach(model: nn.Module) -> None:
    """Undo `_attach`, but for the hooks."""
    for name, method in _METHODS.items():
        if getattr(model.__dict__.get(name), "func", None) is method:
            del model.__dict__[name]


def eject(model: nn.Module) -> nn.Module:
    """Take all blocks out of `model`, in place, and return it: classes, keys and outputs as before.

    Trained blocks are lost with what they learned.

    Args:
        model: An injected model; changed in place.

    Returns:
        The model itself.

    Raises:
        ConfigError: It is no model.
        TraceError: It is wrapped by DDP or sharded by FSDP, or a part of it is scripted.
        SEInjectError: It has no injected blocks, or was optimized for inference; or they replaced attention of the base
            whose weights were not in the file that the model is loaded from. Nothing is changed then.

    Example:
        >>> import se_inject, timm
        >>> model = timm.create_model("test_resnet")
        >>> keys = list(model.state_dict())
        >>> list(se_inject.eject(se_inject.inject(model)).state_dict()) == keys
        True
    """
    refuse(model, "eject", traced=False)
    owners = edited_owners(model)
    refuse_changed_owners(model, f"eject({_model_name(model)})")
    if not owners:
        raise SEInjectError(f"eject({_model_name(model)}): there are no injected blocks in this model; nothing was changed")
    if any(p.is_meta and not q.is_meta for owner, old in replaced_modules(model).items() for p, q in zip(
            old.parameters(), owner.parameters())):
        raise SEInjectError(
            f"eject({_model_name(model)}): its blocks replaced the base's own attention, whose weights are not in the file "
            "of the model: take the base from the file or the model that was injected; nothing was changed")
    with all_or_nothing(model):
        for owner in owners:
            undo_edits(owner)
        forget_injections(model)
    return model


def forget_injections(model: nn.Module) -> None:
    """Make a model whose blocks are gone a base again, also for timm, which writes its name into files."""
    remove_hooks(model)
    for m in model.modules():
        _detach(m)
        unfreeze_base(m)
        if injections_of(m):
            set_injections(m, ())
            rename(m, injected=False)
        args = m.__dict__.get("_model_args")
        if isinstance(args, dict):
            m.__dict__["_model_args"] = {k: v for k, v in args.items() if not k.startswith("se_")}


def prepare(
    model: nn.Module, config: SEConfig, inputs: Inputs, name: str, *, what: str = "inject",
    drawn: bool = False,
) -> Prepared:  # fmt: skip
    """Find the sites and make everything that can fail, without changing the model. `what` is the function, for errors."""
    with recorded(model, config, inputs, what) as t:
        found, untraced = placed_sites(model, t, config, drawn=drawn)
        jobs = owner_jobs(found, t)
    for option, glob in without_match(config, [*(s.site for s in found), *untraced]):
        _logger.warning("%s=%r matches no site of %s: a glob is of whole paths, such as 'layer4.*'", option, glob, name)
    params = sum(p.numel() for p in model.parameters())
    plan = Plan(name, config, t.run.input_size, params, t.run.macs, (*(s.site for s in found), *untraced), t.run.ended)
    return Prepared(plan, tuple(jobs), inputs)


@contextlib.contextmanager
def recorded(
    model: nn.Module, config: SEConfig, inputs: Inputs = None, what: str = "inject"
) -> Iterator[TracedModel]:
    """Check model and options, and run the model on the meta device. Inside, its modules can be traced."""
    refuse(model, what)
    with entered(torch.inference_mode(False)):  # a block is made to see whether it can be
        if (why := problem(config)) is not None:
            raise ConfigError(why)
    with traced(model, inputs, to_the_end=False) as t:
        yield t


def placed_sites(
    model: nn.Module, traces: TracedModel, config: SEConfig, *, drawn: bool = False
) -> tuple[list[PlacedSite], list[Site]]:
    """`find_sites` for a model that may have blocks already."""
    taken = {m: f"{path}.{slots_of(m)[0]}".lstrip(".") for path, m in model.named_modules() if edits_of(m) is not None}
    return find_sites(model, traces, config, taken=taken, drawn=drawn)


def _model_name(model: object) -> str:
    return architecture_of(model) or type(model).__name__
