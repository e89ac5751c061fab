"""The weights of an injected model as timm's own twin of it loads them."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..blocks.identity import gains
from ..capture.inputs import runs_on, smaller_sizes, without_values
from ..capture.snapshot import restored
from ..errors import Refusal, SEInjectError
from ..surgery.session import traced
from ..surgery.state import block_paths, injections_of
from ..timm_names import PREFIX
from ..weights.recipe import Recipe
from ..weights.writing import write_safetensors
from .absorb import Absorber
from .gates import absorb_gain

FURTHER = 12  # candidates outside the base's own file


class NativeWeights(dict[str, torch.Tensor]):
    """A state dict that a native timm model loads strictly. Pickled and copied, it is a plain `OrderedDict`.

    Attributes:
        architecture: The native model's timm name.
        model_args: The arguments of `timm.create_model` beside it.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], architecture: str, model_args: Mapping[str, Any]) -> None:
        super().__init__(tensors)
        self.architecture = architecture
        self.model_args = dict(model_args)

    def __reduce__(self) -> Any:
        return OrderedDict, (), None, None, iter(self.items())  # what plain torch.load takes, where there is no se_inject


@torch.no_grad()
def to_native(model: nn.Module, path: str | os.PathLike[str] | None = None) -> NativeWeights:
    """The weights of `model` for the native timm model that computes the same. The model is not changed.

    Factors of the gates (`init="identity"` has 2) are taken into the weights around, which is exact for powers of two
    as long as nothing overflows or becomes subnormal. The native model is looked for among timm's, and built, loaded and
    compared on random images in eval and train mode: what is returned is proved to give equal outputs.

    Args:
        model: An injected timm model.
        path: Also write a safetensors file there, for ``timm.create_model(architecture, checkpoint_path=path)``.

    Returns:
        The state dict, with the native model's `architecture` and `model_args`.

    Raises:
        SEInjectError: timm has no such model, or a gate's factor does not go into the weights; the message says what was
            tried.

    Example:
        >>> w = se_inject.to_native(model)  # doctest: +SKIP
        >>> timm.create_model(w.architecture, **w.model_args).load_state_dict(w, strict=True)  # doctest: +SKIP
    """
    name = type(model).__name__ if isinstance(model, nn.Module) else repr(model)
    if not isinstance(model, nn.Module) or not injections_of(model):
        raise SEInjectError(f"to_native({name}): there are no injected blocks in this model; inject() it first")
    recipe = Recipe.of(model, injections_of(model), "full")
    if recipe.architecture is None:
        raise SEInjectError(
            f"to_native({name}): this model was not made by timm.create_model, so timm has no twin of it; "
            "use save(), or fold() or eject()")
    weights = _without_gains(model, recipe.architecture)
    with torch.random.fork_rng(devices=sorted({p.device.index for p in model.parameters() if p.is_cuda})):
        found = _twin(model, recipe.architecture, recipe.model_args, weights)
    if path is not None:
        header = {"architecture": found.architecture, "model_args": json.dumps(found.model_args, sort_keys=True)}
        write_safetensors(path, found, header, max_shard_size=2**63)  # timm reads no shards
    return found


def _without_gains(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """The model's state dict, where the gates' factors are in the weights.

    Raises:
        SEInjectError: A factor does not go into the weights.
    """
    weights = {k: t.detach().clone() for k, t in model.state_dict().items()}
    todo = [(path, m, gain) for path in block_paths(model) for m, gain in gains(model.get_submodule(path))]
    if not todo:
        return weights
    with traced(model) as traces:
        absorber = Absorber(model, traces, compensate=True)
        scalings = []
        for path, module, gain in todo:
            try:
                scalings += [(s, gain) for s in absorb_gain(absorber, module, gain)]
            except Refusal as error:
                raise SEInjectError(
                    f"to_native({name}): the factor {gain:g} of the gate of {path!r} does not go into the weights "
                    f"around it ({error}); inject with init='timm', which has none, or use save()") from None
    for s, gain in scalings:
        weights[s.key] = s.scale(weights[s.key], torch.tensor([gain]))
    return weights


def _twin(model: nn.Module, base: str, args: dict[str, Any], weights: dict[str, torch.Tensor]) -> NativeWeights:
    """The first of timm's models that has these tensors and gives equal outputs.

    Raises:
        SEInjectError: There is none.
    """
    near, further = _candidates(base)
    needed = {k: v for k, v in args.items() if k in ("num_classes", "in_chans", "img_size")}
    fitting: dict[str, None] = {}
    for given in [needed, args] if needed != args else [args]:  # the base may need arguments that its twin has by itself
        for name in (*near, *further):
            native = _built(name, given, weights)
            if native is not None and _equal(model, native):
                return NativeWeights(weights, name, given)
            fitting |= {} if native is None else {name: None}
    fits = f" {', '.join(fitting)} have its tensors, but other outputs." if fitting else ""
    raise SEInjectError(
        f"to_native({base}): timm has no model with these {len(weights)} tensors and the same outputs.{fits} Tried were the "
        f"{len(near)} other models in the same file and {len(further)} of like names: blocks in other places, of another "
        "width or kind than timm's have no twin; use save(), fold() or eject()")


def _built(name: str, args: dict[str, Any], weights: dict[str, torch.Tensor]) -> nn.Module | None:
    """The named model with `weights`, or None where it does not take the arguments or has other tensors."""
    import timm

    try:
        skeleton = without_values(lambda: timm.create_model(name, **args))
    except Exception:  # whatever its constructor makes of arguments that are another model's
        return None
    if {k: t.shape for k, t in skeleton.state_dict().items()} != {k: t.shape for k, t in weights.items()}:
        return None
    native: nn.Module = timm.create_model(name, **args)
    native.load_state_dict(weights, strict=True)
    return native


def _candidates(base: str) -> tuple[list[str], list[str]]:
    """timm's models in the base's own file, and those of others whose names are like the base's, the likest first."""
    import timm
    from timm.models import _registry

    home = _registry._model_to_module.get(base)
    names = [n for n in timm.list_models() if not n.startswith(PREFIX) and n != base]
    likeness = difflib.SequenceMatcher(b=base)

    def like(name: str) -> float:
        likeness.set_seq1(name)
        return -likeness.ratio()

    names.sort(key=like)
    near = [n for n in names if _registry._model_to_module.get(n) == home]
    return near, [n for n in names if _registry._model_to_module.get(n) != home][:FURTHER]


def _equal(model: nn.Module, native: nn.Module) -> bool:
    """Whether two models give equal outputs on random images in eval and train mode. `model` is afterwards as it was."""
    size = next((s for s in smaller_sizes(model) if runs_on(model, s) and runs_on(native, s)), None)
    p = next(p for p in model.parameters() if p.is_floating_point())
    if size is None:
        return False
    native.to(device=p.device, dtype=p.dtype)
    with _as_it_was(model):
        images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0)).to(p.device, p.dtype)
        for training in (False, True):
            outputs = []
            for m in (model, native):
                torch.manual_seed(1)
                type(m).train(m, training)  # not by the instance: freeze_base holds layers of the one in eval mode
                outputs.append(m(images))
            a, b = outputs
            if type(a) is not type(b) or not isinstance(a, torch.Tensor) or not torch.equal(a, b):
                return False
    return True


@contextlib.contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Afterwards the model's modes, attributes and the values of its buffers are as before."""
    buffers = [(t, t.clone()) for t in model.buffers()]
    with restored(list(model.modules())):
        try:
            yield
        finally:
            for t, values in buffers:
                t.copy_(values)
