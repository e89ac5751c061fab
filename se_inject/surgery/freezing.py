"""What training asks of an injected model: the blocks' parameters, and a frozen base."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable

import torch
from torch import nn

from ..errors import ConfigError, SEInjectError
from .state import block_paths, head_paths

_FROZEN = "_se_frozen"


def se_parameters(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> list[nn.Parameter]:
    """The parameters of the injected blocks, in the order of the model's modules. Changes nothing.

    An optimizer that was made before the injection does not have them, and says nothing about it: with
    `optimizer`, those that it lacks are returned, to be added to it. A scheduler and an EMA that were made before
    do not know the new group either: make them after.

    Args:
        model: An injected model; wrapped by DDP or `torch.compile`, too.
        optimizer: Leave out what it has.

    Returns:
        The parameters; with `optimizer`, those that it lacks, which may be none.

    Raises:
        SEInjectError: The model has no injected blocks.

    Example:
        >>> optimizer.add_param_group({"params": se_inject.se_parameters(model, optimizer), "lr": 1e-3})  # doctest: +SKIP
    """
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            f"se_parameters(optimizer={optimizer!r}): expected a torch.optim.Optimizer, or None for all parameters")
    known = {id(p) for group in optimizer.param_groups for p in group["params"]} if optimizer is not None else set()
    found = {id(p): p for path in _paths(model, "se_parameters") for p in model.get_submodule(path).parameters()}
    return [p for key, p in found.items() if key not in known]


def freeze_base(model: nn.Module, head: bool | nn.Module = True) -> nn.Module:
    """Let the blocks alone learn, in place, and return the model; `unfreeze_base` undoes it.

    Of everything else `requires_grad` is False, and the layers that keep statistics (BatchNorm) stay in eval mode, also
    after ``model.train()``: a training step changes no tensor of the base. Dropout and drop path go on as they are.
    Names, classes and the state dict do not change. Freeze before the optimizer, DDP or FSDP are made, and after a
    `reset_classifier`.

    Args:
        model: An injected model, not wrapped; changed in place.
        head: Whether the classifier learns, too, as a new task needs it; True takes ``model.get_classifier()``. For a
            model without that, give the module itself.

    Raises:
        SEInjectError: The model has no injected blocks; nothing was changed.
        ConfigError: `head` is True and the model does not say its own, or it is no part of the model.

    Example:
        >>> model = timm.create_model("se_inject/resnet50", pretrained=True, num_classes=10)  # doctest: +SKIP
        >>> optimizer = timm.optim.create_optimizer_v2(se_inject.freeze_base(model), "adamw")  # doctest: +SKIP
    """
    _paths(model, "freeze_base")
    names = _head_names(model, head)
    unfreeze_base(model)
    learns = _learning(model, names)
    frozen = {name: p for name, p in model.named_parameters() if not _inside(name, learns) and p.requires_grad}
    for p in frozen.values():
        p.requires_grad_(False)
    model.__dict__[_FROZEN] = _Frozen(names, frozenset(frozen))
    model.__dict__["train"] = functools.partial(_train, model)
    _hold_statistics(model)
    return model


def unfreeze_base(model: nn.Module) -> nn.Module:
    """Undo `freeze_base`, in place, and return the model: what was frozen before it stays frozen.

    A model that is not frozen is left as it is.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"unfreeze_base({model!r}) needs a model")
    state: _Frozen | None = model.__dict__.pop(_FROZEN, None)
    if state is None:
        return model
    model.__dict__.pop("train", None)
    for name, p in model.named_parameters():
        if name in state.parameters:
            p.requires_grad_(True)
    for name, m in model.named_modules():
        if name in state.held:
            m.training = True
    return model


@dataclasses.dataclass
class _Frozen:
    """What `freeze_base` did: the names of the head, of what it froze, and of what is held in eval mode now."""

    head: tuple[str, ...]
    parameters: frozenset[str]
    held: frozenset[str] = frozenset()


def _train(model: nn.Module, mode: bool = True) -> nn.Module:
    """The `train` of a frozen model: its own, after which what keeps statistics goes back to eval mode."""
    type(model).train(model, mode)
    _hold_statistics(model)
    return model


def _hold_statistics(model: nn.Module) -> None:
    """Put in eval mode what may write its buffers in train mode: norms, and layers with buffers that are made of no others.

    A module of several layers with a buffer, as in attention, often asks its own mode for the rate of a dropout.
    """
    state: _Frozen = model.__dict__[_FROZEN]
    learns = _learning(model, state.head)
    held = {
        name: m for name, m in model.named_modules()
        if m.training and m._buffers and not _inside(name, learns)
        and (not m._modules or any(key.startswith("running_") for key in m._buffers))}
    for m in held.values():
        m.training = False
    state.held = frozenset(held)


def _learning(model: nn.Module, head: Iterable[str]) -> tuple[str, ...]:
    return (*block_paths(model), *head)


def _inside(name: str, paths: Iterable[str]) -> bool:
    return any(name == path or name.startswith(f"{path}.") for path in paths)


def _paths(model: nn.Module, function: str) -> list[str]:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{function}({model!r}) needs a model")
    paths = block_paths(model)
    if not paths:
        raise SEInjectError(
            f"{function}({type(model).__name__}): there are no injected blocks in this model; inject() it first")
    return paths


def _head_names(model: nn.Module, head: object) -> tuple[str, ...]:
    if head is False:
        return ()
    if head is True:
        if not hasattr(model, "get_classifier"):
            raise ConfigError(
                f"freeze_base({type(model).__name__}): this model has no get_classifier() that says its head: give the "
                "module itself, as in head=model.fc, or head=False to train the blocks alone")
        return tuple(head_paths(model))
    modules = [m for m in (head if isinstance(head, (tuple, list)) else (head,)) if m is not None]
    names = {m: name for name, m in model.named_modules()}
    if any(not isinstance(m, nn.Module) or not names.get(m) for m in modules):
        raise ConfigError(
            f"freeze_base({type(model).__name__}): head={head!r} is no module inside this model: give one, as in "
            "head=model.fc, or True or False")
    return tuple(names[m] for m in modules)
