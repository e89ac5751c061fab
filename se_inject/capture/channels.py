"""Which axis of a tensor holds the channels, and which the batch, followed through the operators of a run.

A convolution says it; every other operator carries it on: a permutation moves it, a reshape keeps its place in
memory order, a linear layer over another axis leaves it alone. So it is known in any layout and at any size, and
a mixer over tokens is not taken for one over channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

_aten = torch.ops.aten
# Where the channels are: the number of elements before one of them in the flattened order of the leading axes, and
# how many there are. A view changes neither.
_Where = tuple[int, int]
CHANNEL_AXIS, BATCH_AXIS = "_se_channels", "_se_batch"


def mark(t: torch.Tensor, axis: int, key: str) -> None:
    """Mark `axis` as the one that holds the channels, or the batch, of `t`."""
    t.__dict__[key] = (math.prod(t.shape[:axis]), t.shape[axis])


def channel_axis(t: torch.Tensor) -> int | None:
    """The axis that holds the channels of `t`; None where it is not known or several axes hold them."""
    return _axis(t, CHANNEL_AXIS)


def batch_is_first(t: torch.Tensor) -> bool:
    """Whether the batch, perhaps with windows folded into it, is the first axis; True where it is not known."""
    where: _Where | None = t.__dict__.get(BATCH_AXIS)
    return where is None or where[0] == 1


def _axis(t: torch.Tensor, key: str) -> int | None:
    axes = _axes(t, key)
    return axes[0] if axes is not None and len(axes) == 1 else None


def _axes(t: torch.Tensor, key: str) -> list[int] | None:
    """The neighboring axes that together hold the channels, or the batch."""
    where: _Where | None = t.__dict__.get(key)
    if where is None:
        return None
    before, size = 1, 1
    axes: list[int] = []
    for axis, n in enumerate(t.shape):
        if axes or (before == where[0] and (n > 1 or where[1] == 1)):
            axes.append(axis)
            size *= n
            if size >= where[1]:
                return axes if size == where[1] else None
        before *= n
    return None


def follow(packet: Any, args: Sequence[Any], out: Any) -> None:
    """Carry the axes of channels and batch from the arguments of an operator to its result."""
    if isinstance(out, torch.Tensor):
        rule = _RULES.get(packet, _alike)
        rule(args, out, CHANNEL_AXIS)
        rule(args, out, BATCH_AXIS)
    elif isinstance(out, (list, tuple)):  # of parts (split) or with statistics (norms): each like the first argument
        for part in out:
            if isinstance(part, torch.Tensor):
                _alike(args[:1], part, CHANNEL_AXIS)
                _alike(args[:1], part, BATCH_AXIS)


def _alike(args: Sequence[Any], out: torch.Tensor, key: str) -> None:
    """A result with as many axes as an argument has its channels on the same axis."""
    if key in out.__dict__:  # in place
        return
    for a in args:
        if isinstance(a, torch.Tensor) and a.dim() == out.dim() and key in a.__dict__:
            if a.shape == out.shape:
                out.__dict__[key] = a.__dict__[key]
                return
            axis = _axis(a, key)
            if axis is not None:
                mark(out, axis, key)
                return


def _convolution(args: Sequence[Any], out: torch.Tensor, key: str) -> None:
    mark(out, 1 if key == CHANNEL_AXIS else 0, key)


def _view(args: Sequence[Any], out: torch.Tensor, key: str) -> None:
    if key in args[0].__dict__:
        out.__dict__[key] = args[0].__dict__[key]


def _permuted(order: Sequence[int], source: torch.Tensor, out: torch.Tensor, key: str) -> None:
    axes = _axes(source, key)
    if axes is not None:
        places = sorted(order.index(axis) for axis in axes)
        if places == list(range(places[0], places[0] + len(places))):
            out.__dict__[key] = (math.prod(out.shape[:places[0]]), math.prod(out.shape[p] for p in places))


def _permute(args: Sequence[Any], out: torch.Tensor, key: str) -> None:
    _permuted([d % out.dim() for d in args[1]], args[0], out, key)


def _transpose(args: Sequence[Any], out: torch.Tensor, key: str) -> None:
    if out.dim() > 1:
        order = list(range(out.dim()))
        a, b = (d % out.dim() for d in args[1:3]) if len(args) > 2 else (0, 1)
        order[a], order[b] = b, a
        _permuted(order, args[0], out, key)


def _matmul(x: torch.Tensor, out: torch.Tensor, key: str) -> None:
    """A product over the last axis makes channels there; channels on another axis stay."""
    where = x.__dict__.get(key)
    rows = math.prod(x.shape[:-1])
    if key == CHANNEL_AXIS and (where is None or where == (rows, x.shape[-1])):
        mark(out, out.dim() - 1, key)
    elif where is not None and where[0] * where[1] <= rows:
        out.__dict__[key] = where


def _bmm(args: Sequence[Any], out: torch.Tensor, key: str) -> None:
    if key in args[0].__dict__:
        _matmul(args[0], out, key)


def _cat(args: Sequence[Any], out: torch.Tensor, key: str) -> None:
    _alike(args[0], out, key)


def _shifted(source: torch.Tensor, out: torch.Tensor, key: str, dim: int, by: int) -> None:
    axis = _axis(source, key)
    if axis is not None and (by > 0 or axis != dim):
        mark(out, axis + by if axis >= dim else axis, key)


def _unsqueeze(args: Sequence[Any], out: torch.Tensor, key: str) -> None:
    _shifted(args[0], out, key, args[1] % out.dim(), 1)


def _stack(args: Sequence[Any], out: torch.Tensor, key: str) -> None:
    dim = (args[1] if len(args) > 1 else 0) % out.dim()
    for t in args[0]:
        if key in t.__dict__:
            _shifted(t, out, key, dim, 1)
            return


def _select(args: Sequence[Any], out: torch.Tensor, key: str) -> None:
    _shifted(args[0], out, key, args[1] % args[0].dim(), -1)


def _reduced(args: Sequence[Any], out: torch.Tensor, key: str) -> None:
    source = args[0]
    axis = _axis(source, key)
    if out.dim() == source.dim():
        _alike(args, out, key)
    elif axis is not None and len(args) > 1 and isinstance(args[1], (int, list, tuple)):
        gone = {d % source.dim() for d in ([args[1]] if isinstance(args[1], int) else args[1])}
        if axis not in gone and len(gone) == source.dim() - out.dim():
            mark(out, axis - sum(d < axis for d in gone), key)


_RULES: dict[Any, Callable[[Sequence[Any], torch.Tensor, str], None]] = {
    _aten.convolution: _convolution, _aten.im2col: _convolution, _aten.col2im: _convolution,
    _aten.addmm: lambda args, out, key: _matmul(args[1], out, key), _aten.mm: lambda args, out, key: _matmul(args[0], out, key),
    _aten.bmm: _bmm, _aten.view: _view, _aten._unsafe_view: _view, _aten.permute: _permute, _aten.transpose: _transpose,
    _aten.t: _transpose, _aten.cat: _cat, _aten.unsqueeze: _unsqueeze, _aten.stack: _stack, _aten.select: _select,
    _aten.squeeze: _reduced, _aten.mean: _reduced, _aten.sum: _reduced, _aten.amax: _reduced, _aten.max: _reduced,
}  # fmt: skip
