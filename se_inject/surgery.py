"""The Python door: plan, inject and eject."""

from __future__ import annotations

import dataclasses
import logging
from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import fx, nn

from .axes import BATCH as BATCH_AXIS
from .axes import CHANNELS, mark
from .blocks import BlockSpec, make_block, problem
from .config import SEConfig
from .edits import Edit, OwnerEdits, apply_edits, edited_owners, parameters_near, undo_edits
from .errors import ConfigError, NoSitesError, SEInjectError, TraceError
from .graph import Traces
from .layers import attach_matcher, detach_matcher
from .loading import register_hooks, remove_hooks
from .meta import MetaOps
from .naming import architecture_of, base_name, rename
from .optimized import refuse_optimised
from .patterns import LINEAR, UNLEARNED
from .planning import Plan, Site
from .record import Call, abstract, record, run
from .rewrite import generate, regenerate
from .signature import frozen
from .sites import PlacedSite, find_sites
from .slots import takes_activation
from .trace import is_plain_sequential
from .tracer import patched
from .training import unfreeze_base

_logger = logging.getLogger("se_inject")
BATCH = 2  # images in the recorded run; more than one, so that no size of 1 stands for two things


@dataclasses.dataclass(frozen=True)
class Injection:
    """What one call of `inject` did; a model keeps all of its own, in order, as ``_se_injections``."""

    config: SEConfig
    sites: tuple[Site, ...]
    input_size: tuple[int, ...] | None = None  # where it was asked for

    def written(self) -> SEConfig:
        """The options as they go to a file: the sites that a `filter_fn` chose are there by name."""
        if self.config.filter_fn is None:
            return self.config
        return dataclasses.replace(
            self.config, filter_fn=None, include=tuple(s.path for s in self.sites), exclude=None)


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
    return prepare(model, config, input_size, name).plan


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
        raise NoSitesError(no_sites_message(prepared.plan))
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
            if "_se_edits" in module.__dict__:
                undo_edits(module)
        if injections_of(model):  # earlier ones stay
            register_hooks(model)
            attach_matcher(model)
        raise
    replaced = [key for s in prepared.plan.sites for key in s.replaces]
    if replaced:
        _logger.info("%d base tensors replaced: %s", len(replaced), ", ".join(replaced))
    model.__dict__["_se_injections"] = (*injections_of(model), Injection(config, prepared.plan.sites, prepared.input_size))
    rename(model, injected=True)
    added = [p for named in blocks for block in named.values() for p in block.parameters()]
    _logger.info("%d blocks injected, with %s parameters", sum(map(len, blocks)), f"{sum(p.numel() for p in added):,}")
    if any(p.grad is not None for p in model.parameters()):
        _logger.warning(
            "the model has gradients: an optimizer made before the injection does not have the %d new parameters: "
            'optimizer.add_param_group({"params": se_inject.se_parameters(model, optimizer)})', len(added))
    return model


def injections_of(model: nn.Module) -> tuple[Injection, ...]:
    """What was injected into `model`, in order."""
    done: tuple[Injection, ...] = model.__dict__.get("_se_injections", ())
    return done


def eject(model: nn.Module) -> nn.Module:
    """Take all blocks out of `model`, in place, and return it: classes, keys and outputs as before.

    Trained blocks are lost with what they learned.

    Raises:
        SEInjectError: The model has no blocks of ours.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"eject({model!r}) needs a model")
    refuse_optimised(model, "eject")
    owners = edited_owners(model)
    other = [type(m).__name__ for m in owners if hasattr(m, "_se_base") and "_se_base" not in type(m).__dict__]
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
    """Let a model whose blocks are gone be what it is: a base, also to timm, which writes it into what it saves."""
    remove_hooks(model)
    for m in model.modules():
        detach_matcher(m)
        unfreeze_base(m)
        if m.__dict__.pop("_se_injections", None) is not None:
            rename(m, injected=False)
        args = m.__dict__.get("_model_args")
        if isinstance(args, dict):
            m.__dict__["_model_args"] = {k: v for k, v in args.items() if not k.startswith("se_")}


def prepare(
    model: nn.Module, config: SEConfig, input_size: tuple[int, ...] | None, name: str
) -> Prepared:
    """Find the sites and make everything that can fail, without changing the model."""
    with torch.inference_mode(False):  # a block is made to see whether it can be
        _refuse(model, config)
    asked = None if input_size is None else _checked(input_size)
    for owner in edited_owners(model):
        regenerate(owner)
    with abstract(model):
        sizes = [asked] if asked is not None else input_sizes(model)
        root, macs, size = _record(model, sizes, _dtype(model))
        traces = Traces(root)
        with patched():
            found, unknown = find_sites(model, traces, config, size)
            jobs = _jobs(found, traces)
    params = sum(p.numel() for p in model.parameters())
    made = Plan(name, config, size, params, macs // BATCH, (*(s.site for s in found), *unknown))
    return Prepared(made, tuple(jobs), asked)


def _checked(size: object) -> tuple[int, ...]:
    if isinstance(size, (tuple, list)) and len(size) == 3 and all(type(n) is int and n > 0 for n in size):
        return tuple(size)
    raise ConfigError(f"input_size={size!r}: expected (C, H, W), three whole numbers above 0, such as (3, 224, 224)")


def _record(model: nn.Module, sizes: list[tuple[int, ...]], dtype: torch.dtype) -> tuple[Call, int, tuple[int, ...]]:
    """Run on the first of `sizes` that the model takes; the error is that of the first."""
    first: TraceError | None = None
    for size in map(tuple, sizes):
        try:
            images = torch.empty(BATCH, *size, device="meta", dtype=dtype)
            mark(images, 0, BATCH_AXIS)
            mark(images, 1, CHANNELS)
            return *record(model, images), size
        except TraceError as error:
            first = first or error
    assert first is not None
    raise first


def record_model(model: nn.Module, size: tuple[int, ...] | None = None) -> Call:
    """The recorded run of a model on an input of this (C, H, W), or of its own size. Use it inside `abstract`.

    Raises:
        ConfigError: It is no (C, H, W).
        TraceError: The model does not take it.
    """
    return _record(model, input_sizes(model) if size is None else [_checked(size)], _dtype(model))[0]


def _jobs(found: list[PlacedSite], traces: Traces) -> list[Job]:
    """Group the sites by owner and generate the owners' code; a site whose owner refuses gets a reason."""
    owners: dict[nn.Module, list[PlacedSite]] = defaultdict(list)
    for s in found:
        if s.site.reason is None:
            owners[s.view.module].append(s)
    jobs: list[Job] = []
    made: dict[Hashable, type[nn.Module] | dict[str, fx.Graph] | TraceError | None] = {}
    for module, group in owners.items():
        edits = _edits(module, group)
        key = (traces.signatures.of(module), edits.edits, frozen(edits.constants), edits.decisions)
        if key not in made:
            try:
                forward = group[0].view.forward
                made[key] = generate(module, edits, None if forward.decisions else forward.graph)
            except TraceError as error:
                made[key] = error
        code = made[key]
        if isinstance(code, TraceError):
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
    """The owner's child that is called last on the way to a site."""
    names = (str(n.target).partition(".")[0] for n in s.view.calls_before(s.place.node))
    return next((name for name in names if name in s.view.module._modules and name != s.site.slot), "")


def _block(found: PlacedSite, owner: nn.Module, model: nn.Module, config: SEConfig) -> nn.Module:
    site = found.site
    device, dtype = parameters_near(owner, model)
    spec = BlockSpec(config.block, site.channels, site.rd_channels, site.layout, site.style, config.bias)
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


def _refuse(model: nn.Module, config: SEConfig) -> None:
    """Raise for what cannot be planned or rewritten, with the call that works."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"expected a torch.nn.Module or a timm name, found {type(model).__name__}")
    refuse_optimised(model, "inject")
    why = problem(config)
    if why is not None:
        raise ConfigError(why)
    for m in model.modules():
        kind = type(m).__name__
        if kind in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"):
            raise TraceError(f"the model is wrapped by {kind}: inject(model.module) first, then wrap it")
        if kind.startswith("FSDP"):
            raise TraceError("the model is sharded by FSDP: inject it first, then call fully_shard")
        if kind == "OptimizedModule":
            raise TraceError("the model is compiled: inject the original module (model._orig_mod), then compile it")
        tensors = (*m._parameters.values(), *m._buffers.values())
        if any(t is not None and nn.parameter.is_lazy(t) for t in tensors):
            raise TraceError("the model has lazy layers without weights: run it on one batch first, then inject it")
        if isinstance(m, torch.jit.ScriptModule):
            raise TraceError("the model is a TorchScript module: inject the original model, then script it")


def no_sites_message(made: Plan) -> str:
    if not made.all_sites:
        return (f"{made.model}: no site found at input size {made.input_size}: no residual, aggregation or "
                "convolution that a block could gate; print(se_inject.plan(model)) shows what was looked at")
    counts: dict[str, int] = defaultdict(int)
    for s in made.all_sites:
        assert s.reason is not None
        counts[s.reason.partition(" at ")[0]] += 1
    reasons = "; ".join(f"{n} x {reason}" for reason, n in sorted(counts.items()))
    places = [s for s in made.all_sites if s.kind != "unknown" and s.reason not in (LINEAR, UNLEARNED)]
    if places and all(s.reason is not None and s.reason.startswith("already has") for s in places):
        return (f"{made.model}: all {len(places)} sites already have channel attention: "
                'use existing="stack" or existing="replace"')
    chosen = any(s.reason == made.config.rejects(s) for s in made.all_sites)
    advice = ": widen the options that leave them out" if chosen else ""
    return f"{made.model}: all {len(made.all_sites)} sites are skipped ({reasons}){advice}"


def input_sizes(model: nn.Module) -> list[tuple[int, ...]]:
    """The (C, H, W) that a model may take, the likeliest first.

    A model of timm's says its own. Of others, the first convolution says the channels, and the size is
    ImageNet's or CIFAR's.
    """
    cfg = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    said = tuple(cfg.get("input_size") or ()) if hasattr(cfg, "get") else ()
    patches = getattr(getattr(model, "patch_embed", None), "img_size", None)
    side = tuple(patches) if isinstance(patches, (tuple, list)) and len(patches) == 2 else said[1:]
    channels: list[int] = []
    for value in (getattr(model, "_model_args", {}).get("in_chans"), getattr(model, "in_chans", None), *said[:1]):
        if isinstance(value, int):
            channels.append(value)
    for m in model.modules():
        weight = m._parameters.get("weight")
        if weight is not None and weight.dim() == 4:
            channels.append(weight.shape[1] * getattr(m, "groups", 1))
            break
    sides = [side] if side else [(224, 224), (32, 32)]
    return [(c, *s) for s in sides for c in dict.fromkeys(channels or [3])]


def runs_on(model: nn.Module, size: tuple[int, ...]) -> bool:
    """Whether `model` takes an input of this (C, H, W)."""
    with abstract(model):
        try:
            run(model, torch.empty(BATCH, *size, device="meta", dtype=_dtype(model)))
        except TraceError:
            return False
    return True


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())


def _model_name(model: object) -> str:
    return architecture_of(model) or type(model).__name__


def skeleton(name: str, **args: Any) -> nn.Module:
    """The named timm model, as `without_values`; `args` are for timm.

    Raises:
        ConfigError: timm has no such model, or does not know an argument.
    """
    import timm
    from timm.models import get_arch_name

    bare = base_name(name)
    if ":" not in bare and not timm.is_model(bare):  # "hf-hub:" and "local-dir:" are looked up by timm
        raise ConfigError(unknown_model_message(name, get_arch_name(bare)))
    try:
        return without_values(lambda: timm.create_model(bare, **args))
    except Exception as error:
        if not args:
            raise
        raise ConfigError(f"timm cannot create {bare!r} with {args} ({error!r}): give the arguments that it takes") from error


def without_values(make: Callable[[], nn.Module]) -> nn.Module:
    """A new model on the meta device; on the CPU where its constructor asks for the values of tensors.

    Older timm does, for its drop path rates, and torchvision's RegNet for its widths.
    """
    try:
        with torch.device("meta"), MetaOps():
            return make()
    except (NotImplementedError, RuntimeError):
        return make()


def unknown_model_message(name: str, architecture: str) -> str:
    """What to say about a name that timm does not have."""
    import difflib

    import timm

    close = difflib.get_close_matches(architecture, timm.list_models(), n=3)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else "; timm.list_models() has the names"
    return f"timm has no model {name!r}{hint}"
