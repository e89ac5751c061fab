"""Which keys a state dict may lack: all of a block's, or the whole base."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ..errors import WeightsError
from ..surgery.load_hooks import Parts, at_hand, hook_of, keep_absent_base, keep_absent_block


def around_blocks(filter_fn: Callable[..., Any] | None) -> Callable[..., Any]:
    """A family's filter of checkpoints, which knows nothing of blocks, for the tensors of the base alone.

    Raises:
        WeightsError: A part of a block's tensors is missing; timm would not say so where the head is another.
    """

    def filtered(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
        parts = Parts.of(model)
        broken = parts_of_blocks(parts, state_dict)
        if broken:
            raise WeightsError(
                f"{len(broken)} tensors of blocks are missing ({', '.join(broken[:3])}), while others of the same blocks "
                "are there: save the model again")
        if filter_fn is None or parts.is_adapter(state_dict):
            return state_dict
        of_blocks = {k: t for k, t in state_dict.items() if k in parts.se}
        of_base = {k: t for k, t in state_dict.items() if k not in parts.se}
        try:
            of_base = filter_fn(of_base, model)
        except TypeError:  # as timm does, for filters of one argument
            of_base = filter_fn(of_base)
        return {**of_base, **of_blocks}

    return filtered


def parts_of_blocks(parts: Parts, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The tensors of blocks that are missing while others of the same block are there."""
    missing: list[str] = []
    for keys in parts.blocks.values():
        there = [k in tensors for k in keys]
        if any(there) and not all(there):
            missing += [k for k, found in zip(keys, there) if not found]
    return missing


def load_strictly(model: nn.Module, tensors: Mapping[str, torch.Tensor], source: object, parts: Parts | None = None) -> None:
    """Load all of `tensors` in place, or raise and leave the model as it was. `parts` are the model's, where at hand.

    Raises:
        WeightsError: Keys are missing or unknown, shapes differ, a tensor begins with NaN, or the model has no memory.
    """
    parts = parts or Parts.of(model)
    own = parts.everything()
    empty = [k for k, t in own.items() if t.is_meta]
    if empty:
        raise WeightsError(
            f"{source} cannot be loaded into {type(model).__name__}: {len(empty)} of its tensors are on the meta device, "
            f"without memory ({', '.join(empty[:3])}); make it on a device, or load without model=")
    wrong = [
        f"{k}: {tuple(t.shape)} in the file, {tuple(own[k].shape)} in the model"
        for k, t in tensors.items() if k in own and own[k].shape != t.shape]
    if wrong:
        raise WeightsError(
            f"{source}: {len(wrong)} of {len(tensors)} tensors have another shape ({'; '.join(wrong[:3])}): "
            "check the architecture, num_classes, in_chans and the options of the injection")
    missing = [] if parts.is_partial(tensors) else [
        k for k in (*parts.base, *parts.head)
        if k not in tensors and not k.endswith("num_batches_tracked")]  # torch can do without
    missing += parts_of_blocks(parts, tensors)
    unknown = [k for k in tensors if k not in own]
    if missing or unknown:
        said = [f"{len(keys)} {word} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
                for word, keys in (("missing", missing), ("unknown", unknown)) if keys]
        raise WeightsError(
            f"{source} does not fit {type(model).__name__}: {' and '.join(said)} of its {len(own)} tensors; "
            "check the architecture, num_classes and the options of the injection")
    integers = [k for k, t in tensors.items() if own[k].is_floating_point() and not t.is_floating_point()]
    if integers:
        raise WeightsError(
            f"{source}: {len(integers)} tensors are of another type than the model's ({integers[0]}: "
            f"{tensors[integers[0]].dtype} for {own[integers[0]].dtype}), as in quantized weights; save them in floating point")
    bad = _not_numbers(tensors)
    if bad:
        raise WeightsError(f"{source}: {len(bad)} tensors hold NaN ({', '.join(bad[:3])}); save a sound model")
    alone = parts.is_partial(tensors) and not parts.is_adapter(tensors)  # a head, as was asked for
    token = at_hand.set((model, parts))
    try:
        if _loads_plainly(model, own):
            _copy(model, own, dict(tensors))
        else:
            model.load_state_dict(dict(tensors), strict=not alone)
    finally:
        at_hand.reset(token)


def _loads_plainly(model: nn.Module, own: Mapping[str, torch.Tensor]) -> bool:
    """Whether `load_state_dict` of a model comes to a copy of each tensor, as no module has a way of its own."""
    usual = (nn.Module._load_from_state_dict, _NormBase._load_from_state_dict)
    names = ("load_state_dict", "_load_from_state_dict")
    if type(model).load_state_dict is not nn.Module.load_state_dict:
        return False
    tensors: set[int] = set()
    for m in model.modules():
        if (type(m)._load_from_state_dict not in usual or type(m).set_extra_state is not nn.Module.set_extra_state
                or m._load_state_dict_post_hooks or any(name in m.__dict__ for name in names)
                or any(hook_of(h) not in (keep_absent_base, keep_absent_block) for h in m._load_state_dict_pre_hooks.values())):
            return False
        tensors.update(map(id, m._parameters.values()), map(id, m._buffers.values()))
    return all(type(t) in (torch.Tensor, nn.Parameter) and id(t) in tensors for t in own.values())


@torch.no_grad()
def _copy(model: nn.Module, own: Mapping[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
    """What `load_state_dict` does to such a model, without its walk, which takes as long as the copies of small tensors."""
    keep_absent_base(model, tensors, "", {}, True, [], [], [])
    for key, tensor in own.items():
        if key in tensors:
            tensor.copy_(tensors[key])


def _not_numbers(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """The tensors that hold NaN, if one of them begins with it: training that diverged leaves it everywhere, and to read
    all would take several times as long as to load it."""
    starts: dict[torch.dtype, list[torch.Tensor]] = defaultdict(list)
    for t in tensors.values():
        if t.is_floating_point() and t.numel():
            starts[t.dtype].append(t.detach().as_strided((1,), (1,)))
    if not any(bool(torch.cat(few).isnan().any()) for few in starts.values()):
        return []
    return [k for k, t in tensors.items() if t.is_floating_point() and t.isnan().any()]
