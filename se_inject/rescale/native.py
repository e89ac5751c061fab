"""`to_native`: the weights of an injected model for timm's own model that computes the same."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..blocks.identity import gains
from ..capture.inputs import runs_on, smaller_sizes, without_values
from ..capture.snapshot import restored
from ..capture.values import equal
from ..errors import Refusal, SEInjectError
from ..private import home_of
from ..surgery.refusals import refuse_plain
from ..surgery.session import traced
from ..surgery.state import block_paths, injections_of
from ..timm_names import PREFIX
from ..undo import undone
from ..weights.recipe import FULL, Recipe
from ..weights.writing import write_safetensors
from .absorb import Absorber
from .gates import absorb_gain

FURTHER = 12  # candidates from other files than the base's
_SHARED_ARGS = ("num_classes", "in_chans", "img_size")  # arguments of the base that its twin needs, too

Shapes = dict[str, torch.Size]


class NativeWeights(dict[str, torch.Tensor]):
    """A state dict that a native timm model loads strictly. Pickled and copied, it is a plain `OrderedDict`.

    Attributes:
        architecture: The native model's timm name.
        model_args: The arguments of `timm.create_model` besides the name.

    Example:
        >>> import se_inject, timm
        >>> weights = se_inject.to_native(timm.create_model("se_inject/regnetx_002", num_classes=7))
        >>> weights.architecture
        'regnety_002'
        >>> native = timm.create_model(weights.architecture, **weights.model_args)
        >>> native.load_state_dict(weights, strict=True)
        <All keys matched successfully>
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], architecture: str, model_args: Mapping[str, Any]) -> None:
        super().__init__(tensors)
        self.architecture = architecture
        self.model_args = dict(model_args)

    def __reduce__(self) -> Any:
        return OrderedDict, (), None, None, iter(self.items())  # plain torch.load takes this, without se_inject


@torch.no_grad()
def to_native(model: nn.Module, path: str | os.PathLike[str] | None = None) -> NativeWeights:
    """The weights of `model` for the native timm model that computes the same. The model is not changed.

    First, constant factors in the gates (`init="identity"` has 2) go into the weights around them, by the same rescaling as in
    `fold`. Powers of two do not round, unless a value overflows or becomes subnormal. Then timm's models in the same file
    are tried, and some with similar names. A model with the same tensors is built, loaded and compared on random
    images in eval and train mode, so the outputs are known to be equal.

    Args:
        model: An injected timm model.
        path: Also write a safetensors file there, for ``timm.create_model(architecture, checkpoint_path=path)``.

    Returns:
        The state dict, with the native model's `architecture` and `model_args`.

    Raises:
        ConfigError: `model` is no model.
        TraceError: The model is wrapped, compiled or scripted.
        SEInjectError: The model has no blocks or is not timm's; a factor does not go into the weights; or timm has no such
            model, and the message says what was tried and how the nearest model differs.

    Example:
        >>> import os, se_inject, tempfile, timm
        >>> model = timm.create_model("se_inject/regnetx_002")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = os.path.join(folder, "native.safetensors")
        ...     weights = se_inject.to_native(model, file)
        ...     native = timm.create_model("regnety_002", checkpoint_path=file)
        >>> weights.architecture
        'regnety_002'
    """
    refuse_plain(model, "to_native")
    recipe = Recipe.of(model, injections_of(model), FULL)
    if recipe.architecture is None:
        raise SEInjectError(
            f"to_native({type(model).__name__}): this model was not made by timm.create_model, so timm has no twin of it; "
            "use save(), or fold() or eject()")
    weights = _without_gains(model, recipe.architecture)
    with torch.random.fork_rng(devices=sorted({p.device.index for p in model.parameters() if p.is_cuda})):
        found = _twin(model, recipe, recipe.architecture, weights)
    if path is not None:
        header = {"architecture": found.architecture, "model_args": json.dumps(found.model_args, sort_keys=True)}
        write_safetensors(path, found, header, max_shard_size=2**63)  # timm reads no shards
    return found


def _without_gains(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """The model's state dict, with the constant factors of the gates in the weights.

    Raises:
        SEInjectError: A factor does not go into the weights.
    """
    weights = {k: t.detach().clone() for k, t in model.state_dict().items()}
    found = [(path, m, gain) for path in block_paths(model) for m, gain in gains(model.get_submodule(path))]
    if not found:
        return weights
    with traced(model) as traces:
        absorber = Absorber(model, traces, compensate=True)
        scalings = []
        for path, module, gain in found:
            try:
                scalings += [(s, gain) for s in absorb_gain(absorber, module, gain)]
            except Refusal as refusal:
                raise SEInjectError(
                    f"to_native({name}): the factor {gain:g} of the gate of {path!r} does not go into the weights "
                    f"around it ({refusal}); inject with init='timm', which has no factor, or use save()") from None
    for s, gain in scalings:
        weights[s.key] = s.scale(weights[s.key], torch.tensor([gain]))
    return weights


def _twin(model: nn.Module, recipe: Recipe, base: str, weights: dict[str, torch.Tensor]) -> NativeWeights:
    """The first of timm's models that has these tensors and gives equal outputs.

    Raises:
        SEInjectError: There is none.
    """
    shapes = {k: t.shape for k, t in weights.items()}
    near, further = _candidates(base)
    args = recipe.model_args
    shared = {k: v for k, v in args.items() if k in _SHARED_ARGS}
    fitting: list[str] = []  # models with these tensors, and other outputs
    others: dict[str, Shapes] = {}
    for given in [shared, args] if shared != args else [args]:  # the twin may have the base's other arguments by default
        for name in (*near, *further):
            found = _shapes_of(name, given)
            if found is None:
                continue
            if found != shapes:
                others.setdefault(name, found)
                continue
            if _equal(model, _loaded(name, given, weights)):
                return NativeWeights(weights, name, given)
            fitting.append(name)
    raise SEInjectError(". ".join((
        f"to_native({base}): timm has no model with these {len(shapes)} tensors and the same outputs",
        *_reasons(recipe, shapes, fitting, others),
        f"Tried were the {len(near)} other models in the same file, and {len(further)} with similar names",
        "Use save(), fold() or eject()")))


def _reasons(recipe: Recipe, shapes: Shapes, fitting: Sequence[str], others: Mapping[str, Shapes]) -> list[str]:
    """Why there is no twin: how the nearest of timm's models differ, and which options may be the cause.

    Args:
        recipe: The recipe of the injected model.
        shapes: The shapes of its tensors.
        fitting: The timm models with tensors of these shapes.
        others: The shapes of the other timm models' tensors.
    """
    said = []
    blocks = tuple(f"{site}." for site in recipe.sites)
    attended = [name for name, theirs in others.items() if any(key.startswith(blocks) for key in theirs)]
    if fitting:
        names = ", ".join(dict.fromkeys(fitting))
        said.append(f"These tensors, but other outputs: {names}; perhaps the activation differs")
    elif attended:
        name = min(attended, key=lambda n: len(shapes.items() ^ others[n].items()))
        said.append(f"The nearest with blocks in these places is {name}, which {_difference(others[name], shapes)}")
    else:
        said.append("None of those tried has blocks in these places")
    options = {k: v for config in recipe.configs for k, v in config.to_dict().items() if k not in ("block", "init")}
    if options:
        said.append(f"These options are not at their defaults: {', '.join(f'{k}={v!r}' for k, v in options.items())}")
    return said


def _difference(theirs: Shapes, ours: Shapes) -> str:
    """How the tensors of one model differ from those of another."""
    kinds = (
        ("also has", [k for k in theirs if k not in ours]), ("lacks", [k for k in ours if k not in theirs]),
        ("has another shape of", [k for k in ours if k in theirs and theirs[k] != ours[k]]))
    return ", and ".join(
        f"{what} {keys[0]}" + (f" and {len(keys) - 1} more" if keys[1:] else "") for what, keys in kinds if keys)


def _shapes_of(name: str, args: dict[str, Any]) -> Shapes | None:
    """The shapes of a timm model's tensors; None if the model does not take these arguments."""
    import timm

    try:
        return {k: t.shape for k, t in without_values(lambda: timm.create_model(name, **args)).state_dict().items()}
    except MemoryError:
        raise
    except Exception:  # the arguments are another model's, and a constructor may raise anything
        return None


def _loaded(name: str, args: dict[str, Any], weights: dict[str, torch.Tensor]) -> nn.Module:
    import timm

    native: nn.Module = timm.create_model(name, **args)
    native.load_state_dict(weights, strict=True)
    return native


def _candidates(base: str) -> tuple[list[str], list[str]]:
    """timm's models in the base's own file, and those of other files with the most similar names; the most similar first."""
    import timm

    home = home_of(base)
    names = [n for n in timm.list_models() if not n.startswith(PREFIX) and n != base]
    likeness = difflib.SequenceMatcher(b=base)

    def unlikeness(name: str) -> float:
        likeness.set_seq1(name)
        return -likeness.ratio()

    names.sort(key=unlikeness)
    near = [n for n in names if home_of(n) == home]
    return near, [n for n in names if home_of(n) != home][:FURTHER]


def _equal(model: nn.Module, native: nn.Module) -> bool:
    """Whether two models give equal outputs on random images in eval and train mode, and then have equal statistics.

    `model` is not changed.
    """
    size = next((s for s in smaller_sizes(model) if runs_on(model, s) and runs_on(native, s)), None)
    p = next(p for p in model.parameters() if p.is_floating_point())
    if size is None:
        return False
    native.to(device=p.device, dtype=p.dtype)
    with _unchanged(model):
        images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0)).to(p.device, p.dtype)
        for training in (False, True):
            outputs = []
            for m in (model, native):
                torch.manual_seed(1)
                type(m).train(m, training)  # the class's method: that of a frozen base keeps its layers in eval mode
                outputs.append(m(images))
            if not equal(*outputs):
                return False
        buffers = dict(model.named_buffers())
        return all(torch.equal(t, buffers[k]) for k, t in native.named_buffers() if k in buffers)


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Afterwards the model's `training` flags, its attributes and the values of its buffers are as before."""
    buffers = [(t, t.clone()) for t in model.buffers()]

    def put_back() -> None:
        for t, values in buffers:
            t.copy_(values)

    with restored(list(model.modules())), undone(put_back):
        yield
