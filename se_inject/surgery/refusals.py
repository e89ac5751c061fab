"""Models that a function cannot work on, each with the call that works; the same for every function that takes a model."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import nn

from ..errors import ConfigError, NoSitesError, SEInjectError, TraceError
from ..find.patterns import LINEAR, UNLEARNED
from ..find.plan import Plan, rejected
from .state import injections_of, is_optimized

_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")


def refuse(model: object, what: str, *, optimized: bool = False, values: bool = False) -> None:
    """Raise for a model that `what`, the name of a function, cannot work on.

    Args:
        model: What the function was given.
        what: The function's name, for the message.
        optimized: Whether a copy made by `optimize_for_inference` will do.
        values: Whether the weights must have values.

    Raises:
        ConfigError: It is no model.
        TraceError: It is wrapped, sharded, compiled or scripted, or has layers without weights.
        SEInjectError: It is an optimized copy, or has no values.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{what}({model!r}) needs a model: a torch.nn.Module, such as timm.create_model(...) gives")
    if not optimized:
        refuse_optimized(model, what)
    for path, m in model.named_modules():
        where, argument = ("the model", "model") if not path else (f"its module {path!r}", f"model.{path}")
        kind = type(m).__name__
        if kind in _WRAPPERS:
            raise TraceError(f"{what}: {where} is wrapped by {kind}: {what}({argument}.module) first, then wrap it")
        if kind.startswith("FSDP"):
            raise TraceError(f"{what}: {where} is sharded by FSDP: {what} the model first, then call fully_shard")
        if kind == "OptimizedModule" and m.__class__.__module__.startswith("torch._dynamo"):
            raise TraceError(f"{what}: {where} is compiled: {what} the original module ({argument}._orig_mod), then compile it")
        if isinstance(m, torch.jit.ScriptModule):
            raise TraceError(f"{what}: {where} is a TorchScript module: {what} the original model, then script it")
        tensors = (*m._parameters.values(), *m._buffers.values())
        if any(t is not None and nn.parameter.is_lazy(t) for t in tensors):
            raise TraceError(
                f"{what}: {where} is a lazy layer without weights: run the model on one batch first (lazy layers then have "
                f"their shapes), then {what} it")
    if values and any(p.is_meta for p in model.parameters()):
        raise SEInjectError(f"{what}: the model has no values (meta device): load its weights first")


def refuse_optimized(model: nn.Module, what: str) -> None:
    """Raise for a copy that `optimize_for_inference` made.

    Raises:
        SEInjectError: It is one.
    """
    if is_optimized(model):
        raise SEInjectError(
            f"{what}: this model was optimized for inference, and its weights are no longer those of its architecture; "
            "use the model that it was made from")


def refuse_plain(model: object, what: str) -> None:
    """Raise for a model without injected blocks, too.

    Raises:
        SEInjectError: As `refuse`, or the model has no blocks.
    """
    refuse(model, what)
    assert isinstance(model, nn.Module)
    if injections_of(model):
        return
    inside = next((path for path, m in model.named_modules() if injections_of(m)), None)
    if inside is not None:
        raise SEInjectError(
            f"{what}({type(model).__name__}): the injected model is inside this one: {what}(model.get_submodule({inside!r}))")
    raise SEInjectError(f"{what}({type(model).__name__}): there are no injected blocks in this model; inject() it first")


def no_sites(made: Plan) -> NoSitesError:
    """The error for a plan in which no site gets a block; it gives the reasons."""
    if not made.all_sites:
        return NoSitesError(
            f"{made.model}: no site found at input size {made.input_size}: no residual, aggregation or convolution that a "
            "block could gate; print(se_inject.plan(model)) shows what was looked at")
    counts: dict[str, int] = defaultdict(int)
    for s in made.all_sites:
        assert s.reason is not None
        counts[s.reason.partition(" at ")[0]] += 1
    reasons = "; ".join(f"{n} x {reason}" for reason, n in sorted(counts.items()))
    places = [s for s in made.all_sites if s.kind != "unknown" and s.reason not in (LINEAR, UNLEARNED)]
    if places and all(s.reason is not None and s.reason.startswith("already has") for s in places):
        return NoSitesError(
            f"{made.model}: all {len(places)} sites already have channel attention: "
            'use existing="stack" or existing="replace"')
    chosen = any(s.reason == rejected(made.config, s) for s in made.all_sites)
    advice = ": widen the options that leave them out" if chosen else ""
    return NoSitesError(f"{made.model}: all {len(made.all_sites)} sites are skipped ({reasons}){advice}")
