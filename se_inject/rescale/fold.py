"""Replace gates that hardly vary by their mean over real data, folded into the weights around them."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError, Refusal, SEInjectError, TraceError
from ..find.attention import Gate, gate_of
from ..site import Site
from ..surgery.codegen import generate
from ..surgery.edits import apply_edits, undo_edits
from ..surgery.pipeline import forget_injections
from ..surgery.session import traced
from ..surgery.state import base_class, edited_owners, edits_of, injections_of, set_injections, slots_of
from .absorb import Absorber
from .gates import absorb_gate, around, outer_gain
from .operator_rules import Scaling
from .report import FoldedSite, FoldReport


@dataclasses.dataclass(eq=False)
class _Found:
    """A block, its gate, and the weights that may take the gate in. The statistics are Welford's, over images."""

    site: Site
    block: nn.Module
    gate: Gate | None = None
    scalings: tuple[Scaling, ...] = ()
    outer: float = 1.0
    reason: str | None = None
    count: int = 0
    mean: torch.Tensor = dataclasses.field(default_factory=lambda: torch.zeros(()))
    squares: torch.Tensor = dataclasses.field(default_factory=lambda: torch.zeros(()))

    def add(self, gates: torch.Tensor) -> None:
        gates = gates.flatten(1).cpu().double()
        n = gates.shape[0]
        mean = gates.mean(0)
        squares = (gates - mean).square().sum(0)
        if self.count == 0:
            self.mean, self.squares = mean, squares
        else:
            total, off = self.count + n, mean - self.mean
            self.squares = self.squares + squares + off.square() * (self.count * n / total)
            self.mean = self.mean + off * (n / total)
        self.count += n

    @property
    def variation(self) -> float:
        if self.count == 0:
            return math.nan
        deviation = (self.squares / self.count).sqrt()
        relative = torch.where(deviation == 0, torch.zeros_like(deviation), deviation / self.mean.abs())
        return float(relative.mean())


@torch.no_grad()
def fold(model: nn.Module, loader: Iterable[Any], *, max_variation: float | None = None) -> FoldReport:
    """Replace gates by their mean over real data, in place, and take their blocks out.

    The mean gate is multiplied into the weights before the block, else behind it, so that nothing is left of it: where
    all blocks are folded, the model is a plain base model, and its state dict a base checkpoint. A gate that is the same
    for all images changes the outputs by rounding alone; else the report says by how much. The model is run in eval mode,
    and its modes are afterwards as they were. On any error the model is as it was. While this runs, there is a second
    copy of the model in memory.

    Args:
        model: An injected model; changed in place.
        loader: Batches of images (N, C, H, W), or tuples with the images first, such as timm's loaders give; it is
            gone through twice.
        max_variation: Fold only blocks whose gate varies at most so much, see `FoldedSite.variation`; None folds all that can
            be. The others stay, and the model stays one that `save` and `load` know.

    Returns:
        The report: for each block how much its gate varies, whether it was folded, or why it was kept.

    Raises:
        SEInjectError: The model has no blocks, the loader no images, or gates or outputs are not finite.

    Example:
        >>> report = se_inject.fold(model, loader, max_variation=0.05)  # doctest: +SKIP
        >>> print(report)  # doctest: +SKIP
    """
    name = type(model).__name__ if isinstance(model, nn.Module) else repr(model)
    if not isinstance(model, nn.Module) or not injections_of(model):
        raise SEInjectError(f"fold({name}): there are no injected blocks in this model; inject() it first")
    if max_variation is not None and not (isinstance(max_variation, (int, float)) and max_variation >= 0):
        raise ConfigError(f"max_variation={max_variation!r}: expected a number of at least 0, such as 0.05, or None for all")
    if iter(loader) is loader:
        raise SEInjectError(
            f"fold({name}, loader): the loader is an iterator, and is gone through twice: pass a DataLoader or a list")
    first = next(_batches(loader, model), None)
    if first is None:
        raise SEInjectError(f"fold({name}, loader): the loader gave no batch; it must give image tensors (N, C, H, W)")
    with _evaluating(model):
        found = _find(model, tuple(first.shape[1:]))
        _measure(model, loader, found)
        _check_gates(found, max_variation)
        before = copy.deepcopy(model)
        undo = _apply(model, found)
        try:
            images, change, agreement = _compare(before, model, loader, found)
        except BaseException:
            undo()
            raise
        _forget(model, found)
    sites = tuple(
        FoldedSite(f.site.path, float(f.mean.mean()) if f.count else math.nan, f.variation, f.reason,
                   tuple(s.key for s in f.scalings) if f.reason is None else ())
        for f in found)
    return FoldReport(sites, images, change, agreement)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode; afterwards in the modes that it had, of those modules that are still there."""
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for m, training in modes:
            m.training = training


def _batches(loader: Iterable[Any], model: nn.Module) -> Iterator[torch.Tensor]:
    """The images of each batch, on the model's device.

    Raises:
        SEInjectError: A batch is no images.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for batch in loader:
        images = batch[0] if isinstance(batch, (list, tuple)) and batch else batch
        if not isinstance(images, torch.Tensor) or images.dim() != 4 or not images.is_floating_point():
            what = f"a tensor of {tuple(images.shape)} and {images.dtype}" if isinstance(images, torch.Tensor) else (
                f"a {type(images).__name__}")
            raise SEInjectError(
                f"fold: the loader gave {what}; it must give batches of floating-point images (N, C, H, W), or tuples with "
                "them first")
        if len(images):
            yield images.to(device)


def _find(model: nn.Module, size: tuple[int, ...]) -> list[_Found]:
    """All blocks in the order of their sites, each with the weights that may take its gate in, or the reason why not."""
    found = [_Found(site, model.get_submodule(site.path)) for i in injections_of(model) for site in i.sites]
    try:
        with traced(model, size) as t:
            absorber = Absorber(model, t)
            for f in found:
                try:
                    _find_weights(absorber, f)
                except Refusal as refusal:
                    f.reason = str(refusal)
    except TraceError as error:
        raise SEInjectError(
            f"fold({type(model).__name__}): the model does not take the loader's images, of (C, H, W) = {size}: {error}"
        ) from error
    return found


def _find_weights(absorber: Absorber, f: _Found) -> None:
    """Find a block's gate and the weights that take it in.

    Raises:
        Refusal: There are none.
    """
    calls = absorber.traces.calls.get(f.block, [])
    if not calls:
        raise Refusal("it is not called on these images")
    f.gate = gate_of(absorber.flow, calls[0])
    if f.site.replaces:
        raise Refusal("it replaced the base's own attention, which would come back")
    at = around(absorber, f.block, f.site.layout)
    f.outer = outer_gain(at.view, f.site.slot)
    f.scalings = tuple(absorb_gate(absorber, at))


def _measure(model: nn.Module, loader: Iterable[Any], found: list[_Found]) -> None:
    """Run the model on all images and keep the statistics of the gates.

    Each gate is computed by the block's own traced code from what the block is given, and not by dividing its output by
    its input, which may be 0.
    """
    handles = []

    def hook(f: _Found, gate: nn.Module) -> Any:
        return lambda module, args: f.add(gate(*args))

    try:
        for f in found:
            if f.gate is not None:
                gate = f.gate.function().eval()
                handles.append(f.gate.view.module.register_forward_pre_hook(hook(f, gate)))
        for images in _batches(loader, model):
            model(images)
    finally:
        for h in handles:
            h.remove()


def _check_gates(found: list[_Found], max_variation: float | None) -> None:
    """Give a reason to each block whose gate varies too much.

    Raises:
        SEInjectError: A gate is not finite.
    """
    for f in found:
        if f.gate is not None and not bool(torch.isfinite(f.mean).all() and torch.isfinite(f.squares).all()):
            raise SEInjectError(
                f"fold: the gate of {f.site.path!r} is NaN or infinite on these images; the model was not changed: check its "
                "weights and the images' normalisation")
        if f.reason is None and max_variation is not None and not f.variation <= max_variation:
            f.reason = f"its gate varies by {f.variation:.3g}, more than {max_variation:g}"
        if f.reason is None and bool((f.mean * f.outer < 0).any()) and f.scalings:
            f.reason = "its mean gate is negative, and would not pass a ReLU"


def _apply(model: nn.Module, found: list[_Found]) -> Any:
    """Scale the weights and take the folded blocks out; returns what undoes it. On an error the model is as it was."""
    going = {f.site.path for f in found if f.reason is None}
    parameters = dict(model.named_parameters())
    old = {s.key: parameters[s.key].detach().clone() for f in found if f.reason is None for s in f.scalings}
    states = [(m, type(m), {**m.__dict__, "_modules": dict(m._modules)}) for m in edited_owners(model)]

    def undo() -> None:
        for key, values in old.items():
            parameters[key].copy_(values)
        for m, cls, attributes in states:
            m.__class__ = cls
            m.__dict__.clear()
            m.__dict__.update({**attributes, "_modules": dict(attributes["_modules"])})

    paths = {m: p for p, m in model.named_modules()}
    try:
        for m, _, _ in states:
            prefix = f"{paths[m]}." if paths[m] else ""
            _take_out(m, {slot for slot in slots_of(m) if prefix + slot in going})
        for f in found:
            if f.reason is None:
                for s in f.scalings:
                    p = parameters[s.key]
                    p.copy_(s.scale(p, f.mean * f.outer))
    except BaseException:
        undo()
        raise
    return undo


def _take_out(owner: nn.Module, slots: set[str]) -> None:
    """Take some of an owner's blocks out, in place; with the last one, all that was done to it."""
    if not slots:
        return
    edits = edits_of(owner)
    assert edits is not None
    left = tuple(e for e in edits.edits if e.slot not in slots)
    blocks = {e.slot: owner.get_submodule(e.slot) for e in left}
    undo_edits(owner)
    if left:
        new = dataclasses.replace(edits, edits=left)
        code = generate(owner, new)
        assert type(owner) is base_class(owner)
        apply_edits(owner, new, code, blocks)


def _forget(model: nn.Module, found: list[_Found]) -> None:
    """Let the model's recipe name the blocks that are left."""
    if all(f.reason is not None for f in found):
        return
    kept = [f.site.path for f in found if f.reason is not None]
    injections = []
    for i in injections_of(model):
        sites = tuple(s for s in i.sites if s.path in kept)
        chosen = tuple(s.path for s in sites)
        if sites:  # by name: what was left out is not to come back
            config = dataclasses.replace(i.config, filter_fn=None, include=chosen, exclude=None)
            injections.append(dataclasses.replace(i, config=config, sites=sites))
    if injections:
        set_injections(model, tuple(injections))
        return
    forget_injections(model)


def _compare(
    before: nn.Module, after: nn.Module, loader: Iterable[Any], found: list[_Found]
) -> tuple[int, float, float | None]:
    """Images, relative RMS of the change in outputs, and agreement; and a proof that the fold did what it says.

    Raises:
        SEInjectError: An output is not finite, or the folded model is not the one with constant gates.
    """
    images, change, size, same, classes = 0, 0.0, 0.0, 0, True
    for batch in _batches(loader, after):
        expected, y = _outputs(before(batch)), _outputs(after(batch))
        if images == 0:
            _prove(before, after, batch, y, found)
        images += len(batch)
        for a, b in zip(expected, y):
            change += float((a.double() - b.double()).square().sum())
            size += float(a.double().square().sum())
        classes = classes and len(y) == 1 and y[0].dim() == 2
        same += int((expected[0].argmax(-1) == y[0].argmax(-1)).sum()) if classes else 0
    if not math.isfinite(change) or not math.isfinite(size):
        raise SEInjectError("fold: the model's outputs are NaN or infinite on these images; the model was not changed")
    if images == 0:
        raise SEInjectError(
            "fold: the loader gave no batch when it was gone through again; the model was not changed: pass a DataLoader or "
            "a list")
    return images, math.sqrt(change / size) if size else 0.0, same / images if classes else None


def _outputs(y: Any) -> list[torch.Tensor]:
    if isinstance(y, torch.Tensor):
        return [y]
    return [t for v in (y.values() if isinstance(y, dict) else y) if v is not None for t in _outputs(v)]


def _prove(
    before: nn.Module, after: nn.Module, batch: torch.Tensor, folded: list[torch.Tensor], found: list[_Found]
) -> None:  # fmt: skip
    """That the folded model computes what the model does whose blocks multiply by the mean gates.

    Where the model makes more of rounding than usual, both are compared in double precision.
    """
    handles = []

    def constant(f: _Found) -> Any:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            x = args[0]
            axis = 1 if f.site.layout == "NCHW" else x.dim() - 1
            g = f.mean.to(x.device, x.dtype).view([-1 if d == axis else 1 for d in range(x.dim())])
            return torch.as_tensor(x * g)
        return hook

    for f in found:
        if f.reason is None:
            handles.append(before.get_submodule(f.site.path).register_forward_hook(constant(f)))
    try:
        expected = _outputs(before(batch))
    finally:
        for h in handles:
            h.remove()
    for a, b in zip(expected, folded):
        off = (a.double() - b.double()).square().sum().sqrt()
        if off > math.sqrt(torch.finfo(b.dtype).eps) * a.double().square().sum().sqrt():
            if b.dtype != torch.float64:
                exact = copy.deepcopy(after).double()
                return _prove(copy.deepcopy(before).double(), exact, batch.double(), _outputs(exact(batch.double())), found)
            raise SEInjectError(
                "fold: the folded weights do not do what the mean gates do, which is a defect of se_inject; the model was not "
                "changed: fold fewer blocks with max_variation, or eject()")
