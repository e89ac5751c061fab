"""`optimize_for_inference`: a copy of a model that computes the same in less time."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import fx, nn

from ..capture.calls import Call
from ..capture.example import Inputs, asked
from ..capture.inputs import record_model
from ..capture.snapshot import has_hooks, restored
from ..dataflow.value_flow import ValueFlow
from ..errors import TraceError
from ..surgery.load_hooks import remove_hooks
from ..surgery.refusals import refuse
from ..surgery.session import copied, traced
from ..surgery.state import REPORT, block_paths, given_inputs, set_injections
from ..timm_names import FEATURE_METHODS
from .apply_folds import apply_folds, check_steps, drop_tensors, steps_without
from .find_blocks import find_blocks
from .fold_norms import find_folds
from .regions import find_rewrites, find_sums, merged
from .report import OptimizedModel

_logger = logging.getLogger("se_inject")


@torch.no_grad()
def optimize_for_inference(
    model: nn.Module, *, input_size: tuple[int, ...] | None = None, example_inputs: Any = None,
) -> nn.Module:  # fmt: skip
    """A copy of `model` for inference that computes the same, up to rounding, in less time. The model is not changed.

    - Batch norms are folded into the convolutions and linear layers before them.
    - A squeeze-and-excitation block becomes a product with its gate. The mean is taken of the cheapest tensor upstream that
      determines it: the search goes back through 1x1 convolutions, norms and linear layers, which are merged with the block's
      first layer. The layers of the gate work on vectors.
    - For one image, a gate scales the weights of the layer that reads the gated map, where they are the smaller.
    - A scaling and the residual sum after it are one operator, in the memory of a value that nothing reads any more.

    The model may be injected, have timm's own squeeze-and-excitation, or have none. Classes, module names and methods such as
    ``forward_features`` stay; some weights get other names and shapes. The copy is in eval mode, and its parameters need no
    gradient. Its attribute ``se_report`` says for each block and norm what was done, or why nothing was: print it.

    Args:
        model: A model with weights, injected or not.
        input_size: (C, H, W) for the run on which the model is traced; None is what its injection was given, or the model's
            own. That run computes nothing, and the copy takes all sizes that the model takes.
        example_inputs: What to run the model on instead, as `inject` takes it.

    Returns:
        The copy; ``copy.se_report`` is an `OptimizedModel`.

    Raises:
        ConfigError: It is no model, or `input_size` is no (C, H, W).
        TraceError: The model is wrapped, compiled or scripted, or does not run on the input size; the message gives the call
            that works.
        SEInjectError: The model was optimized before, has no values, or cannot be copied.

    Shape:
        The copy's inputs and outputs are the model's: (N, 3, H, W) to (N, num_classes) for a timm classifier.

    Example:
        >>> import se_inject, timm, torch
        >>> model = se_inject.inject(timm.create_model("test_resnet")).eval()
        >>> fast = se_inject.optimize_for_inference(model)
        >>> x = torch.rand(1, 3, 160, 160)
        >>> torch.allclose(fast(x), model(x), atol=1e-5)
        True
        >>> print(fast.se_report.summary())
        1 of 4 squeezes moved upstream, 15 of 15 batch norms folded, 4 sums in place
    """
    refuse(model, "optimize_for_inference", values=True)
    inputs = asked(input_size, example_inputs)
    inputs = given_inputs(model) if inputs is None else inputs
    injected = set(block_paths(model))
    fast = copied(model, "optimize_for_inference").eval().requires_grad_(False)
    remove_hooks(fast)
    set_injections(fast, ())
    hooked = {m for m in fast.modules() if has_hooks(m)}

    with traced(fast, inputs) as t:
        others = [call for call in (_run_of(fast, method, inputs) for method in FEATURE_METHODS) if call is not None]
        folds, norms = find_folds(ValueFlow(t, hooked), others)
        steps = steps_without(t.root, folds)
    apply_folds(folds)

    values = {**dict(fast.named_parameters(remove_duplicate=False)), **dict(fast.named_buffers(remove_duplicate=False))}
    with traced(fast, inputs) as t:
        check_steps(steps, steps_without(t.root, folds))
        flow = ValueFlow(t, hooked)
        blocks, reports = find_blocks(flow, values, injected)
        sums, kept = find_sums(flow, {block.call for block in blocks})
        rewrites = find_rewrites(flow, merged([*(block.region for block in blocks), *sums]), blocks)
    drop_tensors(folds)
    for rewrite in rewrites:
        rewrite.apply()

    report = OptimizedModel(tuple(reports), norms.folded, norms.kept, sum(r.sums for r in rewrites), kept)
    fast.__dict__[REPORT] = report
    if isinstance(fast, fx.GraphModule):  # its copies keep only the attributes that are named here
        fast.meta.setdefault("_user_preserved_attributes", {})[REPORT] = report
    _logger.info("%s", report.summary())
    return fast


def _run_of(model: nn.Module, method: str, inputs: Inputs) -> Call | None:
    """The recorded run of another method of a model; None where the model has none, or it fails. Use it inside `on_meta`."""
    if not hasattr(model, method):
        return None
    with restored([model]):
        model.__dict__["forward"] = getattr(model, method)
        try:
            found = record_model(model, inputs)
        except TraceError:
            return None
    return found.root if found.error is None else None
