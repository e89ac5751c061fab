"""Load tensors into an injected model strictly: only the whole base, or all tensors of a block, may be absent."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import WeightsError
from ..private import PLAIN_LOADS, copy_each
from ..surgery.load_hooks import drop_prefix, has_other_hooks, log_load
from ..surgery.parts import Parts
from ..surgery.prefixes import prefix_of_some
from ..undo import entered
from .reading import state_dict_in
from .writing import has_memory


def around_blocks(filter_fn: Callable[..., Any] | None) -> Callable[..., Any]:
    """A family's filter of checkpoints, for the tensors of the base alone: it knows nothing of blocks.

    Raises:
        WeightsError: A block lacks some of its tensors. timm does not report that where it adapts the head.
    """

    def filtered(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
        parts = Parts.of(model)
        state_dict = dict(state_dict_in(state_dict))  # from the Hub, timm gives a training checkpoint as it is
        drop_prefix(state_dict, parts)  # where it is certain: the filters of some families know prefixes of others' files
        absent = parts.absent_from_blocks(state_dict)
        if absent:
            raise WeightsError(
                f"the state dict lacks {len(absent)} tensors of blocks ({', '.join(absent[:3])}), but has others of the same "
                "blocks: save the model again")
        if filter_fn is None or parts.is_adapter(state_dict):
            return state_dict
        of_blocks = {k: t for k, t in state_dict.items() if k in parts.se}
        of_base = {k: t for k, t in state_dict.items() if k not in parts.se}
        try:
            of_base = filter_fn(of_base, model)
        except TypeError:  # as in timm, for filters of one argument
            of_base = filter_fn(of_base)
        return {**of_base, **of_blocks}

    return filtered


def load_strictly(
    model: nn.Module, parts: Parts, tensors: Mapping[str, torch.Tensor], source: object, given: bool = True
) -> None:
    """Load all of `tensors` into `model`, in place, or raise and leave the model unchanged.

    Args:
        model: An injected model.
        parts: Its parts.
        tensors: All of a model, or the parts to be loaded over its weights: blocks, head, or both.
        source: The file, for the messages.
        given: Whether the model is the user's; else it was built for the file.

    Raises:
        WeightsError: Keys are missing or unknown, shapes differ, a tensor begins with NaN, or the model has no memory or
            cannot be written to.
    """
    own = {k: t for k, t in parts.everything().items() if isinstance(t, torch.Tensor)}
    _check_fit(model, parts, own, tensors, source, given)
    into = {k: t for k, t in own.items() if k in tensors and not _is_expanded_to(t, tensors[k])}
    fixed = [k for k, t in into.items() if _is_expanded(t) or not has_memory(t)]
    if fixed:
        raise WeightsError(
            f"{source} cannot be loaded into {type(model).__name__}: in {len(fixed)} of its tensors several values are one in "
            f"memory, as expand() makes them, or have no memory ({', '.join(fixed[:3])}): replace them by their clone()")
    # An inference tensor can only be written in inference mode, in which other tensors can be written as well.
    with entered(torch.inference_mode() if any(t.is_inference() for t in into.values()) else torch.no_grad()):
        if _loads_plainly(model, parts.everything()):
            log_load(model, parts, tensors)
            if into:
                copy_each(list(into.values()), [tensors[k] for k in into])
            return
        head_alone = parts.is_partial(tensors) and not parts.is_adapter(tensors)  # for which the hooks fill nothing in
        before = {k: t.detach().clone() for k, t in own.items() if has_memory(t)} if given else {}
        try:
            model.load_state_dict({k: t if k in into else own[k] for k, t in tensors.items()}, strict=not head_alone)
        except BaseException as error:
            for k, t in before.items():
                if not torch.equal(t, own[k]):
                    own[k].copy_(t)
            if isinstance(error, RuntimeError):
                raise WeightsError(f"{source} cannot be loaded into {type(model).__name__}: {error}") from error
            raise


def _is_expanded(tensor: torch.Tensor) -> bool:
    """Whether several of its values are one in memory."""
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride()))


def _is_expanded_to(tensor: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether it is expanded and has this value, so that nothing needs to be written."""
    return _is_expanded(tensor) and torch.equal(tensor, value.to(tensor))


def _check_fit(
    model: nn.Module, parts: Parts, own: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], source: object,
    given: bool,
) -> None:  # fmt: skip
    """Refuse tensors that do not fit; `own` are those of the model.

    Raises:
        WeightsError: See `load_strictly`.
    """
    check = "check the architecture, num_classes, in_chans and the options of the injection"
    check += "" if given else "; a model that timm does not build is loaded by load(path, model=...)"
    on_meta = [k for k, t in own.items() if t.is_meta]
    if on_meta:
        raise WeightsError(
            f"{source} cannot be loaded into {type(model).__name__}: {len(on_meta)} of its tensors are on the meta device, "
            f"without memory ({', '.join(on_meta[:3])}); create it on a device, or load without model=")
    wrong = [
        f"{k}: {tuple(t.shape)} in the file, {tuple(own[k].shape)} in the model"
        for k, t in tensors.items() if k in own and own[k].shape != t.shape]
    if wrong:
        raise WeightsError(
            f"{source}: {len(wrong)} of {len(tensors)} tensors have another shape ({'; '.join(wrong[:3])}): {check}")
    there = {id(own[k]) for k in tensors if k in own}  # a file may have one of the names of a parameter that is shared
    missing = [] if parts.is_partial(tensors) else [
        k for k in (*parts.base, *parts.head)
        if k not in tensors and not k.endswith("num_batches_tracked")  # torch does not need it
        and id(own.get(k)) not in there]
    missing += parts.absent_from_blocks(tensors)
    unknown = [k for k in tensors if k not in own]
    if missing or unknown:
        said = [f"{len(keys)} {word} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
                for word, keys in (("missing", missing), ("unknown", unknown)) if keys]
        prefix = prefix_of_some(unknown, own)
        if prefix is not None and all(prefix + k in tensors for k in missing):
            others = [k for k in unknown if not k.startswith(prefix)]
            check = (f"the names under {prefix!r} are the model's, and {len(others)} others are not ({', '.join(others[:3])}): "
                     f"write {{k[{len(prefix)}:]: t for k, t in state_dict.items() if k.startswith({prefix!r})}} to a file")
        raise WeightsError(
            f"{source} does not fit {type(model).__name__}: {' and '.join(said)} of its {len(own)} tensors; {check}")
    integers = [k for k, t in tensors.items() if own[k].is_floating_point() and not t.is_floating_point()]
    if integers:
        first = integers[0]
        raise WeightsError(
            f"{source}: {len(integers)} tensors have another type than the model's ({first}: {tensors[first].dtype} for "
            f"{own[first].dtype}), as quantized weights do; save them in floating point")
    if empty := [k for k, t in tensors.items() if t.is_meta]:
        raise WeightsError(
            f"{source}: {len(empty)} tensors have no values ({', '.join(empty[:3])}), as of a model on the meta device: save a "
            "model with weights")
    bad = _with_nan(tensors)
    if bad:
        raise WeightsError(
            f"{source}: {len(bad)} tensors hold NaN ({', '.join(bad[:3])}), as after a training that diverged; "
            "load an earlier checkpoint")


def _loads_plainly(model: nn.Module, own: Mapping[str, torch.Tensor]) -> bool:
    """Whether `load_state_dict` of the model only copies each tensor: no module loads its tensors by code of its own.

    The walk of `load_state_dict` takes as long as the copies of small tensors, so that `load_strictly` avoids it.
    """
    names = ("load_state_dict", "_load_from_state_dict")
    if type(model).load_state_dict is not nn.Module.load_state_dict:
        return False
    registered: set[int] = set()
    for m in model.modules():
        if (type(m)._load_from_state_dict not in PLAIN_LOADS or type(m).set_extra_state is not nn.Module.set_extra_state
                or m._load_state_dict_post_hooks or any(name in m.__dict__ for name in names) or has_other_hooks(m)):
            return False
        registered.update(map(id, m._parameters.values()), map(id, m._buffers.values()))
    return all(type(t) in (torch.Tensor, nn.Parameter) and id(t) in registered for t in own.values())


def _with_nan(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The tensors that hold NaN, if the first value of any tensor is NaN.

    A training that diverges leaves NaN everywhere, and reading all values takes several times as long as loading them.
    """
    starts: dict[torch.dtype, list[torch.Tensor]] = defaultdict(list)
    for t in tensors.values():
        if t.is_floating_point() and t.numel():
            starts[t.dtype].append(t.detach().as_strided((1,), (1,)))
    if not any(bool(torch.cat(few).isnan().any()) for few in starts.values()):
        return []
    return [k for k, t in tensors.items() if t.is_floating_point() and t.isnan().any()]
