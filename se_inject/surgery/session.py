"""One traced model at a time: what `plan`, `inject`, `optimize_for_inference`, `fold` and `to_native` begin with."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

from torch import nn

from ..capture.inputs import record_model
from ..capture.snapshot import on_meta
from ..capture.tracer import patched
from ..dataflow.module_graph import TracedModel
from ..errors import SEInjectError
from ..undo import entered, surgery_lock
from .codegen import regenerate
from .state import edited_owners


@contextlib.contextmanager
def traced(model: nn.Module, input_size: tuple[int, ...] | None = None) -> Iterator[TracedModel]:
    """Inside, `model` is as `on_meta` makes it, and was run once. Afterwards it is as it was.

    An owner whose attributes were set since its last call has a stale forward, so such owners are rewritten first.

    Args:
        model: A model, injected or not.
        input_size: (C, H, W) to run the model on; None is the model's own.

    Raises:
        ConfigError: `input_size` is no (C, H, W).
        TraceError: The model does not take it, or a stale owner cannot be rewritten.
    """
    for owner in edited_owners(model):
        regenerate(owner)
    with on_meta(model):
        traces = TracedModel(record_model(model, input_size))
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
