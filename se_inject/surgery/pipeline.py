"""The Python door: plan, inject and eject."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections import defaultdict
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import fx, nn

from ..blocks.build import BlockSpec, make_block, problem
from ..capture.fingerprint import frozen
from ..capture.forward import is_plain_sequential
from ..capture.tracer import patched
from ..config import SEConfig
from ..dataflow.module_graph import TracedModel
from ..errors import ConfigError, Refusal, SEInjectError
from ..find.plan import Plan
from ..find.sites import PlacedSite, find_sites
from ..find.slots import takes_activation
from ..site import Site
from ..timm_names import architecture_of, rename, skeleton
from .codegen import generate
from .edits import apply_edits, parameters_near, undo_edits
from .freezing import unfreeze_base
from .layer_decay import attach_matcher, detach_matcher
from .load_hooks import register_hooks, remove_hooks
from .refusals import no_sites, refuse, refuse_optimized
from .session import traced
from .state import (
    BASE,
    Edit,
    Injection,
    OwnerEdits,
    edited_owners,
    edits_of,
    has_generated_class,
    injections_of,
    set_injections,
    slots_of,
)

_logger = logging.getLogger("se_inject")


@dataclasses.dataclass(eq=False)
class Job:
    """One owner to rewrite: its edits, its generated class, and its sites."""

    module: nn.Module
    edits: OwnerEdits
    code: type[nn.Module] | dict[str, fx.Graph] | None
    found: list[PlacedSite]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A plan with everything made that `apply` needs, so that `apply` cannot fail halfway."""

    plan: Plan
    jobs: tuple[Job, ...]
    input_size: tuple[int, ...] | None = None  # where it was asked for


def plan(
    model: nn.Module | str, config: SEConfig | dict[str, Any] | None = None, *,
    input_size: tuple[int, ...] | None = None, **options: Any,
) -> Plan:  # fmt: skip
    """Say which sites `inject` would fill, and which it would skip and why. Changes nothing.

    Args:
        model: A model, or a timm name; for a name no memory is taken for weights.
        config: An `SEConfig` or a dict of its fields.
        input_size: (C, H, W) to run the model on; None is the model's own.
        **options: Fields of `SEConfig`, on top of `config`.

    Returns:
        The plan; it may have no sites.

    Raises:
        SEInjectError: An option is wrong, the name is unknown, or the model cannot be run.

    Example:
        >>> print(se_inject.plan("resnet50", ratio=1 / 8))  # doctest: +SKIP
    """
    config = SEConfig.of(config, **options)
    name = model if isinstance(model, str) else _model_name(model)
    if isinstance(model, str):
        model = skeleton(model)
    return prepare(model, config, input_size, name, drawn=True).plan


def inject(
    model: nn.Module, config: SEConfig | dict[str, Any] | None = None, *,
    input_size: tuple[int, ...] | None = None, **options: Any,
) -> nn.Module:  # fmt: skip
    """Put blocks into `model`, in place, and return it. On any error the model is as it was.

    Base weights keep their names and values, `training` flags stay, and with ``init="identity"`` the
    outputs are bit-exact until the blocks are trained. New parameters take device and dtype of the
    weights around them. An optimizer that was made before does not know the new parameters and says nothing about it:
    ``optimizer.add_param_group({"params": se_parameters(model, optimizer)})``.

    Args:
        model: A model; changed in place.
        config: An `SEConfig` or a dict of its fields.
        input_size: (C, H, W) to run the model on, without computing; None is the model's own.
        **options: Fields of `SEConfig`, on top of `config`.

    Raises:
        NoSitesError: There is no site, or all are skipped; the message gives the reasons.
        SEInjectError: An option is wrong, or the model is of a kind that cannot be rewritten.

    Example:
        >>> model = se_inject.inject(timm.create_model("resnet50"), ratio=1 / 8)  # doctest: +SKIP
    """
    if isinstance(model, str):
        raise ConfigError(
            f"inject({model!r}) needs a model; write timm.create_model('se_inject/{model}') to make one by name")
    config = SEConfig.of(config, **options)
    return apply(model, prepare(model, config, input_size, _model_name(model)))


def apply(model: nn.Module, prepared: Prepared) -> nn.Module:
    """Put the blocks of `prepare` into `model`, in place, and return it. On any error the model is as it was.

    Raises:
        NoSitesError: There is no site, or all are skipped.
    """
    config = prepared.plan.config
    if not prepared.jobs:
        raise no_sites(prepared.plan)
    with torch.inference_mode(False):  # whose tensors could not be trained or loaded into
        blocks: list[dict[str, nn.Module]] = [
            {s.site.slot: _block(s, job.module, model, config) for s in job.found} for job in prepared.jobs
        ]
    done: list[nn.Module] = []
    try:
        for job, named in zip(prepared.jobs, blocks):
            done.append(job.module)
            apply_edits(job.module, job.edits, job.code, named)
        register_hooks(model)
        attach_matcher(model)
    except BaseException:
        remove_hooks(model)
        detach_matcher(model)
        for module in done:
            if edits_of(module) is not None:
                undo_edits(module)
        if injections_of(model):  # earlier ones stay
            register_hooks(model)
            attach_matcher(model)
        raise
    replaced = [key for s in prepared.plan.sites for key in s.replaces]
    if replaced:
        _logger.info("%d base tensors replaced: %s", len(replaced), ", ".join(replaced))
    set_injections(model, (*injections_of(model), Injection(config, prepared.plan.sites, prepared.input_size)))
    rename(model, injected=True)
    added = [p for named in blocks for block in named.values() for p in block.parameters()]
    _logger.info("%d blocks injected, with %s parameters", sum(map(len, blocks)), f"{sum(p.numel() for p in added):,}")
    if any(p.grad is not None for p in model.parameters()):
        _logger.warning(
            "the model has gradients: an optimizer made before the injection does not have the %d new parameters: "
            'optimizer.add_param_group({"params": se_inject.se_parameters(model, optimizer)})', len(added))
    return model


def eject(model: nn.Module) -> nn.Module:
    """Take all blocks out of `model`, in place, and return it: classes, keys and outputs as before.

    Trained blocks are lost with what they learned.

    Raises:
        SEInjectError: The model has no blocks of ours.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"eject({model!r}) needs a model")
    refuse_optimized(model, "eject")
    owners = edited_owners(model)
    other = [type(m).__name__ for m in owners if hasattr(m, BASE) and not has_generated_class(m)]
    if other:
        raise SEInjectError(
            f"eject({_model_name(model)}): {other[0]} was changed since (by a parametrization, say): undo that first; "
            "nothing was changed")
    if not owners:
        raise SEInjectError(f"eject({_model_name(model)}): there are no injected blocks in this model; nothing was changed")
    for owner in owners:
        undo_edits(owner)
    forget_injections(model)
    return model


def forget_injections(model: nn.Module) -> None:
    """Make a model whose blocks are gone a base again, also for timm, which writes its name into files."""
    remove_hooks(model)
    for m in model.modules():
        detach_matcher(m)
        unfreeze_base(m)
        if injections_of(m):
            set_injections(m, ())
            rename(m, injected=False)
        args = m.__dict__.get("_model_args")
        if isinstance(args, dict):
            m.__dict__["_model_args"] = {k: v for k, v in args.items() if not k.startswith("se_")}


def prepare(
    model: nn.Module, config: SEConfig, input_size: tuple[int, ...] | None, name: str, *, drawn: bool = False
) -> Prepared:
    """Find the sites and make everything that can fail, without changing the model."""
    with recorded(model, config, input_size) as t:
        found, untraced = placed_sites(model, t, config, drawn=drawn)
        jobs = owner_jobs(found, t)
    params = sum(p.numel() for p in model.parameters())
    plan = Plan(name, config, t.run.input_size, params, t.run.macs, (*(s.site for s in found), *untraced))
    return Prepared(plan, tuple(jobs), None if input_size is None else tuple(input_size))


@contextlib.contextmanager
def recorded(model: nn.Module, config: SEConfig, input_size: tuple[int, ...] | None = None) -> Iterator[TracedModel]:
    """Check model and options, and run the model on the meta device. Inside, its modules can be traced."""
    refuse(model, "inject")
    with torch.inference_mode(False):  # a block is made to see whether it can be
        if (why := problem(config)) is not None:
            raise ConfigError(why)
    with traced(model, input_size) as t, patched():
        yield t


def placed_sites(
    model: nn.Module, traces: TracedModel, config: SEConfig, *, drawn: bool = False
) -> tuple[list[PlacedSite], list[Site]]:
    """`find_sites` for a model that may have blocks already."""
    taken = {m: f"{path}.{slots_of(m)[0]}".lstrip(".") for path, m in model.named_modules() if edits_of(m) is not None}
    return find_sites(model, traces, config, taken=taken, drawn=drawn)


def owner_jobs(found: list[PlacedSite], traces: TracedModel) -> list[Job]:
    """Group the sites by owner and generate the owners' code; a site whose owner refuses gets a reason."""
    owners: dict[nn.Module, list[PlacedSite]] = defaultdict(list)
    for s in found:
        if s.site.reason is None:
            owners[s.view.module].append(s)
    jobs: list[Job] = []
    made: dict[Hashable, type[nn.Module] | dict[str, fx.Graph] | Refusal | None] = {}
    for module, group in owners.items():
        edits = _edits(module, group)
        key = (traces.fingerprints.of(module), edits.edits, frozen(edits.constants), edits.decisions)
        if key not in made:
            try:
                forward = group[0].view.forward
                made[key] = generate(module, edits, None if forward.decisions else forward.graph)
            except Refusal as error:
                made[key] = error
        code = made[key]
        if isinstance(code, Refusal):
            for s in group:
                s.site = dataclasses.replace(s.site, reason=str(code))
            continue
        jobs.append(Job(module, edits, code, group))
    return jobs


def _edits(module: nn.Module, group: list[PlacedSite]) -> OwnerEdits:
    first = group[0]
    after = [_child_before(s) for s in group]
    if first.place.fill is not None:
        slot = first.site.slot
        registered = slot in module._modules
        original = module._modules[slot] if registered else module.__dict__[slot]
        return OwnerEdits("fill", (Edit(slot, after[0]),), original=original, original_registered=registered)
    if is_plain_sequential(module):
        return OwnerEdits("insert", tuple(Edit(s.site.slot, child) for s, child in zip(group, after)))
    index = first.view.index
    edits = tuple(
        Edit(s.site.slot, child, index[s.place.node], s.place.node.name,
             None if s.place.users is None else tuple(index[u] for u in s.place.users))
        for s, child in zip(group, after))
    if isinstance(module, fx.GraphModule):
        graphs = {key: graph for key, graph in module.__dict__.items() if isinstance(graph, fx.Graph)}
        return OwnerEdits("graph", edits, original=graphs)
    forward = first.view.forward
    return OwnerEdits("rewrite", edits, tuple(forward.constants.items()), forward.decisions)


def _child_before(s: PlacedSite) -> str:
    """The owner's child that is called last before a site."""
    names = (str(n.target).partition(".")[0] for n in s.view.calls_before(s.place.node))
    return next((name for name in names if name in s.view.module._modules and name != s.site.slot), "")


def _block(found: PlacedSite, owner: nn.Module, model: nn.Module, config: SEConfig) -> nn.Module:
    site = found.site
    device, dtype = parameters_near(owner, model)
    spec = BlockSpec(site.channels, site.rd_channels, site.layout, site.style)
    slot = found.place.fill
    kind: Any = type(owner)
    own = found.place.inner if slot is None else takes_activation(kind, slot.name)
    act = _activation(owner) if own else None
    block = make_block(spec, config, act, found.gain, device, dtype)
    return block.train(owner.training)


def _activation(owner: nn.Module) -> type[nn.Module] | None:
    """The class of an owner's first activation."""
    for m in owner.modules():
        where = type(m).__module__
        if where.endswith((".activation", ".activations", ".activations_me")) and not list(m.children()):
            return type(m)
    return None


def _model_name(model: object) -> str:
    return architecture_of(model) or type(model).__name__
