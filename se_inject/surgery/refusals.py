"""TODO"""

from __future__ import annotations

import torch
from torch import nn

from ..blocks.build import problem
from ..config import SEConfig
from ..errors import ConfigError, SEInjectError, TraceError


def refuse_injection(model: nn.Module, config: SEConfig) -> None:
    """Raise for what cannot be planned or rewritten, with the call that works."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"expected a torch.nn.Module or a timm name, found {type(model).__name__}")
    refuse_optimized(model, "inject")
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


def refuse_optimizing(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"optimize_for_inference({model!r}) needs a model, such as timm.create_model(...) gives")
    refuse_optimized(model, "optimize_for_inference")
    for m in model.modules():
        kind = type(m).__name__
        if kind in ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel") or kind.startswith("FSDP"):
            raise SEInjectError(f"the model is wrapped by {kind}: optimize_for_inference(model.module) instead")
        if kind == "OptimizedModule":
            raise SEInjectError("the model is compiled: optimize_for_inference(model._orig_mod), then compile the copy")
        if isinstance(m, torch.jit.ScriptModule):
            raise SEInjectError("the model is a TorchScript module: optimise the original model, then script the copy")
    if any(p.is_meta for p in model.parameters()):
        raise SEInjectError("the model has no values (meta device): load its weights first, then optimise it")


def refuse_optimized(model: nn.Module, what: str) -> None:
    """
    Raises:
        SEInjectError: The model came out of `optimize_for_inference`.
    """
    if any("se_report" in m.__dict__ or "_se_code" in type(m).__dict__ for m in model.modules()):
        raise SEInjectError(
            f"{what}: this model was optimised for inference, and its weights are no longer those of its architecture; "
            "use the model that it was made from")
