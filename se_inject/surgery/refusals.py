"""Models that a function cannot work on, each with the call that works; the same for every function that takes a model."""

from __future__ import annotations

import keyword
from collections import defaultdict

import torch
from torch import nn

from ..errors import ConfigError, NoSitesError, SEInjectError, TraceError
from ..find.patterns import LINEAR, UNLEARNED
from ..find.plan import Plan, rejected
from .state import BASE, edited_owners, has_generated_class, injections_of, is_optimized

# packages whose layers replace those that are quantized
_QUANTIZERS = ("torchao", "bitsandbytes", "quanto", "hqq", "auto_gptq", "gptqmodel", "awq", "compressed_tensors")
_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")


def refuse(
    model: object, what: str, *, optimized: bool = False, traced: bool = True, values: bool = False, quantized: bool = False
) -> None:  # fmt: skip
    """Raise for a model that `what`, the name of a function, cannot work on.

    Args:
        model: What the function was given.
        what: The function's name, for the message.
        optimized: Whether a copy made by `optimize_for_inference` will do.
        traced: Whether the function runs or traces the model; else a compiled model, a detector and lazy layers will do.
        values: Whether the weights must have values.
        quantized: Whether quantized layers will do.

    Raises:
        ConfigError: It is no model.
        TraceError: It is wrapped, sharded, compiled, scripted or quantized, has layers without weights, or takes no tensor of
            images.
        SEInjectError: It is an optimized copy, or has no values.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{what}({model!r}) needs a model: a torch.nn.Module, such as timm.create_model(...) gives")
    if not optimized:
        refuse_optimized(model, what)
    for path, m in model.named_modules():
        why = _why_not(path, m, what) or (_why_not_traced(path, m, what) if traced else None)
        if why is None and traced and not quantized:
            why = _why_quantized(path, m, what)
        if why is not None:
            raise TraceError(f"{what}: {f'its module {path!r}' if path else 'the model'} {why}")
    if values and any(p.is_meta for p in model.parameters()):
        raise SEInjectError(f"{what}: the model has no values (meta device): load its weights first")


def _at(path: str, inner: str = "") -> str:
    """An expression for a module, or for one inside it, where the user's variable is `model`."""
    if not path:
        return f"model{inner}"
    parts = path.split(".")
    dotted = all(part.isidentifier() and not keyword.iskeyword(part) for part in parts)
    return (f"model.{path}" if dotted else f"model.get_submodule({path!r})") + inner


def _why_not(path: str, m: nn.Module, what: str) -> str | None:
    """Why no function works on a model with this module, and what to do."""
    kind = type(m).__name__
    if kind in _WRAPPERS:
        return f"is wrapped by {kind}: {what}({_at(path, '.module')}) first, then wrap it"
    if kind.startswith("FSDP"):
        return f"is sharded by FSDP: {what}(model) first, then call fully_shard"
    if isinstance(m, torch.jit.ScriptModule):
        if not path:
            return f"is a TorchScript module: call {what} on the original model, then script it"
        return f"is a TorchScript module: put the original module back there, then {what}(model), then script that module again"
    return None


def _why_not_traced(path: str, m: nn.Module, what: str) -> str | None:
    """Why no function that traces works on a model with this module, and what to do."""
    if type(m).__name__ == "OptimizedModule" and m.__class__.__module__.startswith("torch._dynamo"):
        if not path:
            return f"is compiled: {what}(model._orig_mod), the original module, then compile it"
        return (f"is compiled: put its original module back, model.set_submodule({path!r}, {_at(path, '._orig_mod')}), then "
                f"{what}(model), then compile that module again")
    tensors = (*m._parameters.values(), *m._buffers.values())
    if any(t is not None and nn.parameter.is_lazy(t) for t in tensors):
        return ("is a lazy layer without weights: run the model on one batch first (lazy layers then have their shapes), then "
                f"{what}(model)")
    return None


def _why_quantized(path: str, m: nn.Module, what: str) -> str | None:
    """How a module was quantized, if it was, and what to do: the weights of such layers can be neither traced nor copied."""
    found = None
    where = type(m).__module__.split(".")
    if "quantized" in where or where[0] in _QUANTIZERS or m.__dict__.get("hf_quantizer") is not None:
        found = f"{type(m).__module__}.{type(m).__name__}"
    for name, t in (*m._parameters.items(), *m._buffers.items()):
        if t is not None and (_computes_itself(t) or t.is_quantized or (
                type(t) is not nn.Parameter and isinstance(t, nn.Parameter) and not (t.is_floating_point() or t.is_complex()))):
            found = f"its {name!r} is a {type(t).__name__} of {type(t).__module__}"
    if found is None:
        return None
    return f"is quantized ({found}): {'inject' if what == 'plan' else what} first, then quantize"


def _computes_itself(t: torch.Tensor) -> bool:
    """Whether the class of a tensor, which is none of torch's, replaces the operators, as those of quantized tensors do."""
    kind = type(t)
    return not f"{kind.__module__}.".startswith("torch.") and kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


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
    """Raise for a model without injected blocks or without values, too.

    Raises:
        SEInjectError: As `refuse`, or the model has no blocks.
    """
    refuse(model, what, values=True)
    assert isinstance(model, nn.Module)
    if injections_of(model):
        return
    inside = injected_inside(model)
    if inside is not None:
        raise SEInjectError(
            f"{what}({type(model).__name__}): its module {inside!r} is the injected model: {what}({_at(inside)})")
    raise SEInjectError(f"{what}({type(model).__name__}): there are no injected blocks in this model; inject() it first")


def refuse_changed_owners(model: nn.Module, what: str) -> None:
    """Raise for a model in which the class of a block's owner was changed after the injection.

    Raises:
        SEInjectError: It was; nothing is changed then.
    """
    other = [type(m).__name__ for m in edited_owners(model) if hasattr(m, BASE) and not has_generated_class(m)]
    if other:
        raise SEInjectError(
            f"{what}: {other[0]} was changed since (by a parametrization, say): undo that first; nothing was changed")


def injected_inside(model: nn.Module) -> str | None:
    """The path of the injected model that another one holds; None if it holds none, or is it itself."""
    path = next((path for path, m in model.named_modules() if injections_of(m)), None)
    return path or None


def no_sites(model: nn.Module, made: Plan) -> NoSitesError:
    """The error for the plan of a model in which no site gets a block; it gives the reasons."""
    if not made.all_sites:
        ended = f" ({made.ended})" if made.ended is not None else ""
        return NoSitesError(
            f"{made.model}: no site found at input size {made.input_size}{ended}: no residual, aggregation or convolution that "
            "a block could gate; print(se_inject.plan(model)) shows what was looked at")
    counts: dict[str, int] = defaultdict(int)
    for s in made.all_sites:
        assert s.reason is not None
        counts[s.reason.partition(" at ")[0]] += 1
    reasons = "; ".join(f"{n} x {reason}" for reason, n in sorted(counts.items()))
    places = [s for s in made.all_sites if s.kind != "unknown" and s.reason not in (LINEAR, UNLEARNED)]
    if places and all(s.reason is not None and s.reason.startswith("already has") for s in places):
        if injections_of(model):
            return NoSitesError(
                f"{made.model}: all {len(places)} sites already have channel attention, of an earlier injection: eject(model) "
                "first")
        inside = injected_inside(model)
        what = f"its module {inside!r} is an injected model: eject({_at(inside)}) first, or " if inside is not None else ""
        return NoSitesError(
            f"{made.model}: all {len(places)} sites already have channel attention: {what}"
            'use existing="stack" or existing="replace"')
    chosen = any(s.reason == rejected(made.config, s) for s in made.all_sites)
    advice = ": widen the options that leave them out" if chosen else ""
    return NoSitesError(f"{made.model}: all {len(made.all_sites)} sites are skipped ({reasons}){advice}")
