"""One traced model at a time: what `plan`, `inject`, `optimize_for_inference`, `fold` and `to_native` begin with."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

from torch import nn

from ..capture.example import Inputs
from ..capture.inputs import record_model
from ..capture.snapshot import has_hooks, on_meta
from ..capture.tracer import patched
from ..dataflow.module_graph import TracedModel
from ..errors import SEInjectError, TraceError
from ..undo import entered, surgery_lock
from .codegen import regenerate
from .state import edited_owners, given_inputs


@contextlib.contextmanager
def traced(model: nn.Module, inputs: Inputs = None, *, to_the_end: bool = True) -> Iterator[TracedModel]:
    """Inside, `model` is as `on_meta` makes it, and was run once. Afterwards it is as it was.

    An owner whose attributes were set since its last call has a stale forward, so such owners are rewritten first.

    Args:
        model: A model, injected or not.
        inputs: What to run the model on. None is what its last injection was given, or else its own size.
        to_the_end: Whether a run that ends before its end, as it asks for values, is an error.

    Raises:
        TraceError: The model does not take the inputs, or a stale owner cannot be rewritten.
    """
    for owner in edited_owners(model):
        regenerate(owner)
    hooked = {m for m in model.modules() if has_hooks(m)}
    with on_meta(model):
        run = record_model(model, inputs if inputs is not None else given_inputs(model))
        if to_the_end and run.error is not None:
            parts = [call for call in run.root.children if call.end >= 0]
            part = max(parts, key=lambda call: sum(p.numel() for p in call.module.parameters())).path if parts else ""
            raise TraceError(
                f"{type(model).__name__}: {run.ended}, so that what it does then is not known: give a part of it that ends "
                f"before{f', such as its module {part!r}' if part else ''}") from run.error
        traces = TracedModel(run, hooked)
        with patched():  # once for all traces
            yield traces


def copied(model: nn.Module, what: str) -> nn.Module:
    """A deep copy of a model.

    Raises:
        SEInjectError: Python cannot copy it.
    """
    try:
        with entered(surgery_lock):  # during another thread's injection its tensors may be on the meta device
            return copy.deepcopy(model)
    except MemoryError:
        raise
    except Exception as error:
        raise SEInjectError(
            f"{what}: {type(model).__name__} cannot be copied ({type(error).__name__}: {error}): remove what it holds besides "
            "modules and parameters; torch.nn.utils.prune.remove and remove_weight_norm do so") from error
