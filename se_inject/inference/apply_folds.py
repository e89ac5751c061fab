"""Batch norms folded into the layers before them, and a check that the model does nothing else since.

A folded norm keeps its class and its place: its forward does what its children do, such as an activation, or returns its
input.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from ..capture.calls import Call
from ..capture.containers import leaves
from ..capture.trail import first_difference, key, related
from ..errors import TraceError
from .fold_norms import Fold
from .forward_class import become

Steps = list[tuple[str, tuple[tuple[int, ...], ...]]]


def steps_without(root: Call, folds: list[Fold]) -> Steps:
    """The path and the steps of each forward of a run, but for those of the norms and the layers of `folds`.

    The output of such a norm counts as its input. So the steps before and after folding are equal, unless the author's code
    asks a norm or a layer for something else than its output. Use it inside `on_meta`.
    """
    norms, layers = {f.norm for f in folds}, {f.layer for f in folds}
    same = {
        key(c.output): key(x) for c in root.walk() if c.module in norms
        for x in leaves(c.args, c.kwargs) if x is not c.output}

    def steps(call: Call) -> Iterator[tuple[str, tuple[tuple[int, ...], ...]]]:
        if call.module in norms:
            return
        if call.module not in layers:
            yield call.path, related(call.own_trail, leaves(call.args, call.kwargs), call.module, same)
        for child in call.children:
            yield from steps(child)

    return list(steps(root))


def check_steps(before: Steps, after: Steps) -> None:
    """
    Raises:
        TraceError: The model does something else since its norms were folded.
    """
    for (path, old), (other, new) in itertools.zip_longest(before, after, fillvalue=("", ())):
        found = (path, other) if path != other else first_difference(old, new)
        if found is not None:
            raise TraceError(
                f"optimize_for_inference: {path or 'the model'} runs {found[1] or 'nothing'} for {found[0] or 'nothing'} once "
                "batch norms are folded: its forward asks a norm or a layer for more than its output, such as its bias; leave "
                "such questions out")


@torch.no_grad()
def apply_folds(folds: list[Fold]) -> None:
    """Fold norms, in place: a layer gets new weights, and the norm a class without the normalization."""
    for f in folds:
        weight, bias = f.layer._parameters["weight"], f.layer._parameters.get("bias")
        mean, var = f.norm._buffers["running_mean"], f.norm._buffers["running_var"]
        assert weight is not None and mean is not None and var is not None
        gamma, beta = f.norm._parameters.get("weight"), f.norm._parameters.get("bias")
        w, m, v = weight.double(), mean.double(), var.double()
        g = torch.ones_like(m) if gamma is None else gamma.double()
        s = torch.zeros_like(m) if beta is None else beta.double()
        b = torch.zeros_like(m) if bias is None else bias.double()
        if f.linear:
            new, shift = fuse_linear_bn_weights(w, b, m, v, f.eps, g, s)
        else:
            new, shift = fuse_conv_bn_weights(w, b, m, v, f.eps, g, s, f.transposed)
        f.layer._parameters["weight"] = nn.Parameter(new.to(weight.dtype), requires_grad=False)
        f.layer._parameters["bias"] = nn.Parameter(shift.to(weight.dtype), requires_grad=False)
        become(f.norm, f.code)


def drop_tensors(folds: list[Fold]) -> None:
    """Take the tensors of folded norms out of the model."""
    for f in folds:
        for tensors in (f.norm._parameters, f.norm._buffers):
            tensors.update(dict.fromkeys(tensors))
        f.norm.__dict__["track_running_stats"] = False  # else torch adds a count of batches when it loads a state dict
