"""For training: the parameters of the blocks, and a frozen base."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable

import torch
from torch import nn

from ..capture.snapshot import all_or_nothing
from ..errors import ConfigError, SEInjectError
from .parts import norm_parameters
from .refusals import injected_inside, refuse
from .state import block_paths, head_paths

_FROZEN = "_se_frozen"
_RESET = "reset_running_stats"  # a method of norms


def se_parameters(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> list[nn.Parameter]:
    """Return the parameters of the injected blocks, in the order of the model's modules. Changes nothing.

    An optimizer that was created before the injection does not have these parameters, and gives no error. With
    `optimizer`, the result is what it lacks, for its `add_param_group`. Create schedulers and EMA models after that: they
    do not see a new group.

    Args:
        model: An injected model, which DDP or `torch.compile` may wrap; or what fx has traced of one, such as torchvision's
            feature extractors.
        optimizer: Leave out the parameters that this optimizer has.

    Returns:
        The parameters. With `optimizer`, the list may be empty.

    Raises:
        SEInjectError: The model has no injected blocks.
        ConfigError: `model` is not a module, or `optimizer` is not an optimizer.

    Example:
        >>> import se_inject, timm, torch
        >>> model = timm.create_model("test_resnet")
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> model = se_inject.inject(model)
        >>> optimizer.add_param_group({"params": se_inject.se_parameters(model, optimizer), "lr": 0.01})
        >>> len(se_inject.se_parameters(model)), len(se_inject.se_parameters(model, optimizer))
        (16, 0)
    """
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            f"se_parameters(optimizer={optimizer!r}): expected a torch.optim.Optimizer, or None for all parameters")
    known = {id(p) for group in optimizer.param_groups for p in group["params"]} if optimizer is not None else set()
    found = {id(p): p for path in _paths(model, "se_parameters") for p in model.get_submodule(path).parameters()}
    return [p for key, p in found.items() if key not in known]


def freeze_base(model: nn.Module, head: bool | nn.Module = True, norms: bool = False) -> nn.Module:
    """Let only the blocks and the head learn, in place, and return the model. `unfreeze_base` undoes it.

    `requires_grad` of all other parameters becomes False. Layers that keep statistics (BatchNorm) stay in eval mode, also
    after ``model.train()``, so that a training step changes no tensor of the base; `torch.optim.swa_utils.update_bn` leaves
    their statistics as they are. Dropout and drop path work as before.
    Names, classes and the state dict do not change. Freeze before you create the optimizer or wrap the model in DDP or
    FSDP, and after a `reset_classifier`.

    Args:
        model: An injected model, not wrapped; changed in place.
        head: Whether the classifier learns too, as a new task needs. True takes ``model.get_classifier()``; for a model
            without that method, give the module itself.
        norms: Whether the scales and shifts of the base's norms learn too. Their statistics stay as they are.

    Returns:
        `model` itself.

    Raises:
        SEInjectError: The model has no injected blocks, or was optimized for inference; nothing is changed.
        TraceError: It is wrapped by DDP or sharded by FSDP, or a part of it is scripted.
        ConfigError: `model` is not a module, `head` is True and the model does not know its own, `head` is not a
            module of the model, or `norms` is True and the model's norms have no parameters.

    Example:
        >>> import se_inject, timm
        >>> model = timm.create_model("se_inject/test_resnet", num_classes=10)
        >>> model = se_inject.freeze_base(model)
        >>> [name for name, p in model.named_parameters() if p.requires_grad and ".se." not in name]
        ['fc.weight', 'fc.bias']
        >>> model.train().bn1.training
        False
    """
    refuse(model, "freeze_base", traced=False)
    _paths(model, "freeze_base")
    names = _head_names(model, head)
    scales = _norm_names(model, norms)
    with all_or_nothing(model):
        unfreeze_base(model)
        learns = _learning(model, names)
        frozen = {name: p for name, p in model.named_parameters()
                  if p.requires_grad and name not in scales and not _inside(name, learns)}
        for p in frozen.values():
            p.requires_grad_(False)
        model.__dict__[_FROZEN] = _Frozen(names, frozenset(frozen))
        model.__dict__["train"] = functools.partial(_train, model)
        _hold_statistics(model)
    return model


def unfreeze_base(model: nn.Module) -> nn.Module:
    """Undo `freeze_base`, in place, and return the model. Parameters that were frozen before it stay frozen.

    Args:
        model: A model; one that is not frozen stays as it is.

    Returns:
        `model` itself.

    Raises:
        ConfigError: `model` is not a module.

    Example:
        >>> import se_inject, timm
        >>> model = se_inject.freeze_base(timm.create_model("se_inject/test_resnet"))
        >>> model = se_inject.unfreeze_base(model)
        >>> all(p.requires_grad for p in model.parameters()), model.bn1.training
        (True, True)
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"unfreeze_base({model!r}) needs a model, such as timm.create_model(...) returns")
    state: _Frozen | None = model.__dict__.get(_FROZEN)
    if state is None:
        return model
    with all_or_nothing(model):
        del model.__dict__[_FROZEN]
        model.__dict__.pop("train", None)
        for name, p in model.named_parameters():
            if name in state.parameters:
                p.requires_grad_(True)
        for name, m in model.named_modules():
            if name in state.held:
                m.training = True
            if m.__dict__.get(_RESET) is _keep_statistics:
                del m.__dict__[_RESET]
    return model


@dataclasses.dataclass
class _Frozen:
    """What `freeze_base` did, as names.

    Attributes:
        head: Modules of the head that learn.
        parameters: Parameters that it froze.
        held: Modules that it keeps in eval mode, while the model is in train mode.
    """

    head: tuple[str, ...]
    parameters: frozenset[str]
    held: frozenset[str] = frozenset()


def _train(model: nn.Module, mode: bool = True) -> nn.Module:
    """The `train` of a frozen model: that of its class, after which the layers with statistics go back to eval mode."""
    type(model).train(model, mode)
    _hold_statistics(model)
    return model


def _keep_statistics() -> None:
    """The `reset_running_stats` of a frozen norm."""


def _hold_statistics(model: nn.Module) -> None:
    """Put the modules that may write their buffers in train mode into eval mode: norms, and other leaves with buffers.

    Other modules with buffers and children (attention) often need their own mode for the rate of a dropout. A reset of the
    statistics, which `update_bn` of torch.optim.swa_utils begins with, does nothing: no call would fill them again.
    """
    state: _Frozen = model.__dict__[_FROZEN]
    learns = _learning(model, state.head)
    for name, m in model.named_modules():
        if hasattr(type(m), _RESET) and not _inside(name, learns):
            m.__dict__[_RESET] = _keep_statistics
    held = {
        name: m for name, m in model.named_modules()
        if m.training and m._buffers and not _inside(name, learns)
        and (not m._modules or any(key.startswith("running_") for key in m._buffers))}
    for m in held.values():
        m.training = False
    state.held = frozenset(held)


def _norm_names(model: nn.Module, norms: object) -> set[str]:
    """The names of the norms' parameters that learn.

    Raises:
        ConfigError: There are none, or `norms` is neither True nor False.
    """
    if not isinstance(norms, bool):
        raise ConfigError(f"freeze_base({type(model).__name__}, norms={norms!r}): expected True or False")
    found = norm_parameters(model) if norms else set()
    if norms and not found:
        raise ConfigError(f"freeze_base({type(model).__name__}, norms=True): the norms of this model have no parameters, or it "
                          "has no norms: leave norms out")
    return found


def _learning(model: nn.Module, head: Iterable[str]) -> tuple[str, ...]:
    return (*block_paths(model), *head)


def _inside(name: str, paths: Iterable[str]) -> bool:
    return any(name == path or name.startswith(f"{path}.") for path in paths)


def _paths(model: nn.Module, function: str) -> list[str]:
    """The paths of the blocks, for a public function of this name.

    Raises:
        SEInjectError: There are none.
        ConfigError: `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{function}({model!r}) needs a model, such as se_inject.inject(...) returns")
    paths = block_paths(model)
    if not paths:
        raise SEInjectError(f"{function}({type(model).__name__}): this model has no injected blocks; inject() it first")
    return paths


def _head_names(model: nn.Module, head: object) -> tuple[str, ...]:
    """The names of the modules that `head` stands for.

    Raises:
        ConfigError: It stands for none.
    """
    if head is False:
        return ()
    if head is True:
        if not hasattr(model, "get_classifier"):
            inside = injected_inside(model)
            if inside is not None:
                raise ConfigError(
                    f"freeze_base({type(model).__name__}): its module {inside!r} is the injected model: "
                    f"freeze_base(model.get_submodule({inside!r})), or give the head as in head=model.fc")
            raise ConfigError(
                f"freeze_base({type(model).__name__}): this model has no get_classifier() that returns its head: give the "
                "module itself, as in head=model.fc, or head=False to train the blocks alone")
        return tuple(head_paths(model))
    modules = head if isinstance(head, (tuple, list)) else (head,)
    names = {m: name for name, m in model.named_modules()}
    if not modules or any(not isinstance(m, nn.Module) or not names.get(m) for m in modules):
        raise ConfigError(
            f"freeze_base({type(model).__name__}): head={head!r} is not a module inside this model: give one, as in "
            "head=model.fc, or True or False")
    return tuple(names[m] for m in modules)
