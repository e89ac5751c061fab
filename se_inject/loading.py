"""Which keys a state dict may lack: all of a block's, or the whole base."""

from __future__ import annotations

import contextvars
import dataclasses
import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from .blocks import is_identity
from .errors import WeightsError

_logger = logging.getLogger("se_inject")


def keep_absent_block(
    block: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
    missing: list[str], unexpected: list[str], errors: list[str],
) -> None:  # fmt: skip
    """Before a block loads: where no key of it is there, it keeps its values."""
    if not any(key.startswith(prefix) for key in state_dict):
        state_dict.update({prefix + k: t for k, t in _tensors(block).items()})


def keep_absent_base(
    model: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
    missing: list[str], unexpected: list[str], errors: list[str],
) -> None:  # fmt: skip
    """Before an injected model loads: where only keys of blocks, or of blocks and the head, are there, the base keeps
    its values. Says what is loaded."""
    at_hand = _at_hand.get()
    parts = at_hand[1] if at_hand is not None and at_hand[0] is model else Parts.of(model)
    found = {key[len(prefix):]: t for key, t in state_dict.items() if key.startswith(prefix)}
    kept = {k: t for k, t in {**parts.base, **parts.head}.items() if k not in found} if parts.is_adapter(found) else {}
    state_dict.update({prefix + k: t for k, t in kept.items()})
    fits = {k for k, t in parts.everything().items() if k in found and found[k].shape == t.shape}
    of_se = len(fits & parts.se.keys())
    absent = parts.se.keys() - found.keys()
    resting = sum(len(keys) for path, keys in parts.blocks.items()
                  if absent.issuperset(keys) and is_identity(model.get_submodule(path)))
    counts = ((len(fits) - of_se, "base", "loaded"), (len(kept), "base", "kept"), (of_se, "SE", "loaded"),
              (resting, "SE", "at identity"), (len(absent) - resting, "SE", "kept"))
    _logger.info(", ".join(f"{n} {of} tensors {what}" for n, of, what in counts if n))


@dataclasses.dataclass(frozen=True)
class Parts:
    """An injected model's tensors, by name: the very parameters and buffers, of the blocks, the head and the rest.

    `blocks` has the names of each block's tensors, by its path.
    """

    base: dict[str, torch.Tensor]
    head: dict[str, torch.Tensor]
    se: dict[str, torch.Tensor]
    blocks: dict[str, list[str]]

    @classmethod
    def of(cls, model: nn.Module) -> Parts:
        parts = cls({}, {}, {}, {path: [] for path in block_paths(model)})
        heads = dict.fromkeys(head_paths(model))
        for key, tensor in _tensors(model).items():
            path = _holder(key, parts.blocks)
            if path is not None:
                parts.blocks[path].append(key)
                parts.se[key] = tensor
            else:
                (parts.base if _holder(key, heads) is None else parts.head)[key] = tensor
        return parts

    def everything(self) -> dict[str, torch.Tensor]:
        return {**self.base, **self.head, **self.se}

    def is_partial(self, keys: Collection[str]) -> bool:
        """Whether `keys` are those of blocks, of the head, or of both alone, to be loaded over a base."""
        others = {key for key in keys if key not in self.se}
        return bool(keys) and (not others or others == self.head.keys())

    def is_adapter(self, keys: Collection[str]) -> bool:
        """The same, but with blocks: a head alone may as well be what is left of a broken file."""
        return self.is_partial(keys) and any(key in self.se for key in keys)


def _holder(key: str, paths: Collection[str]) -> str | None:
    """Which of the modules at `paths` has the tensor of this name."""
    path = key
    while path:
        path = path.rpartition(".")[0]
        if path in paths:
            return path
    return None


_at_hand: contextvars.ContextVar[tuple[nn.Module, Parts] | None] = contextvars.ContextVar("se_inject_parts", default=None)


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
    token = _at_hand.set((model, parts))
    try:
        if _loads_plainly(model, own):
            _copy(model, own, dict(tensors))
        else:
            model.load_state_dict(dict(tensors), strict=not alone)
    finally:
        _at_hand.reset(token)


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


def block_paths(model: nn.Module) -> list[str]:
    """Dotted names of the injected blocks, in the order of the model's modules."""
    return [
        f"{path}.{edit.slot}" if path else edit.slot
        for path, m in model.named_modules() if "_se_edits" in m.__dict__ for edit in m.__dict__["_se_edits"].edits]


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """What `module`'s state dict holds, by the same names, but the very parameters and buffers."""
    return dict(module.state_dict(keep_vars=True))


def head_paths(model: nn.Module) -> list[str]:
    """Dotted names of a timm model's classifiers; none where it has no weights there."""
    get: Any = getattr(model, "get_classifier", None)
    try:
        found = get() if get is not None else None
    except AttributeError:  # a feature wrapper, which has lost it
        return []
    heads = found if isinstance(found, (tuple, list)) else [found]
    return [path for path, m in model.named_modules() if any(m is head for head in heads) and path]


def register_hooks(model: nn.Module) -> None:
    """Let an injected model, and each of its blocks, load weights that know nothing of the blocks, or of the rest."""
    if not any(hook_of(h) is keep_absent_base for h in model._load_state_dict_pre_hooks.values()):
        model.register_load_state_dict_pre_hook(keep_absent_base)
    for path in block_paths(model):
        block = model.get_submodule(path)
        if not any(hook_of(h) is keep_absent_block for h in block._load_state_dict_pre_hooks.values()):
            block.register_load_state_dict_pre_hook(keep_absent_block)


def remove_hooks(model: nn.Module) -> None:
    """Take `register_hooks`' hook off a model whose blocks go with their own."""
    for m in model.modules():
        for key, h in list(m._load_state_dict_pre_hooks.items()):
            if hook_of(h) in (keep_absent_base, keep_absent_block):
                del m._load_state_dict_pre_hooks[key]


def hook_of(registered: Any) -> Any:
    """The function that torch wrapped when it registered a hook."""
    return getattr(registered, "hook", registered)
