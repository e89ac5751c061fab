"""How a block gets back the values that it was made with.

Loaders and initializers know layers, not blocks: they draw the layers of a block again, leave them on the meta device, or
give them memory without values. So a block and each of its layers have a `reset_parameters`, as torch's layers do. It makes
the block a second time and copies the values: one rule for all kinds of blocks.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import nn

Make = Callable[[Any, Any], nn.Module]  # makes a block on a device, with a data type
_DRAWN = "_is_hf_initialized"  # attribute by which transformers marks tensors, and modules whose tensors it has all drawn


def remember_start(block: nn.Module, make: Make) -> nn.Module:
    """Let a new block and its layers know how to get their values back. Changes the block and its class, and returns it."""
    on_meta = is_on_meta(block)
    for path, m in block.named_modules():
        if not path or m._parameters or m._buffers:
            m.__dict__["reset_parameters"] = functools.partial(_reset, m, make, path)
            m.__dict__[_DRAWN] = not on_meta
    if on_meta:
        block.register_forward_pre_hook(_before_call)
    cls: Any = type(block)
    object.__setattr__(block, "__class__", _starting(cls))
    return block


class _Mark:
    """`_is_hf_initialized` of a block. transformers sets it after it has drawn the layers: those that it has not loaded get
    back their start."""

    def __get__(self, block: nn.Module | None, cls: type[nn.Module]) -> Any:
        return self if block is None else block.__dict__.get(_DRAWN, False)

    def __set__(self, block: nn.Module, value: bool) -> None:
        if is_on_meta(block):
            return
        if value and not block.__dict__.get(_DRAWN, False):
            _copy(block, started(block, "cpu"), {name for name, t in _tensors(block) if not getattr(t, _DRAWN, False)})
            settle(block)
        block.__dict__[_DRAWN] = value


class _Starting(nn.Module):
    """What the class of a block has besides."""

    _se_class: Any
    _is_hf_initialized = _Mark()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """A block that leaves the meta device has no values, and gets those of its start."""
        if not is_on_meta(self):
            return super()._apply(fn, recurse)
        try:
            super()._apply(fn, recurse)
        except NotImplementedError:  # `to` has no values to copy
            _leave_meta(self, "cpu")
            return super()._apply(fn, recurse)
        if not is_on_meta(self):  # `to_empty`
            _copy(self, started(self, "cpu"))
            settle(self)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by the class that the block was made with: one made at run time has no name to import."""
        made: Any = super().__reduce_ex__(protocol)
        return _new, (self._se_class,), *made[2:]


@functools.cache
def _starting(cls: Any) -> Any:
    """A subclass of a class of blocks, under its name."""
    return type(cls.__name__, (_Starting, cls), {
        "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__, "_se_class": cls})  # fmt: skip


def _new(cls: Any) -> Any:
    made = _starting(cls)
    return made.__new__(made)


def is_on_meta(module: nn.Module) -> bool:
    """Whether some tensors of a module have no values."""
    return any(t.is_meta for _, t in _tensors(module))


def started(block: nn.Module, device: Any, dtype: torch.dtype | None = None) -> nn.Module:
    """A new block with the values that `block` had at its start; `dtype` is by default that of `block`."""
    make: Make = block.__dict__["reset_parameters"].args[1]
    return make("cpu", dtype or data_type(block)).to(device)


def data_type(module: nn.Module) -> torch.dtype:
    return next((t.dtype for _, t in _tensors(module) if t.is_floating_point()), torch.float32)


def fitted(value: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
    """`value`, distributed as the tensor `to` is."""
    mesh = getattr(to, "device_mesh", None)
    if mesh is None:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(mesh.device_type), mesh, to.placements)  # type: ignore[attr-defined]


def watch(blocks: list[nn.Module]) -> Callable[[], None]:
    """Remember the values of blocks. The result gives those blocks their start that have other values by then."""
    before = [[t.detach().clone() for _, t in _tensors(block)] for block in blocks]

    def restore() -> None:
        for block, old in zip(blocks, before):
            if any(bool((t != then).any()) for (_, t), then in zip(_tensors(block), old) if not t.is_meta):
                _copy(block, started(block, "cpu"))

    return restore


def settle(block: nn.Module) -> None:
    """Take off the hook of a block that was made on the meta device."""
    for key, hook in list(block._forward_pre_hooks.items()):
        if hook is _before_call:
            del block._forward_pre_hooks[key]


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return itertools.chain(module.named_parameters(), module.named_buffers())


@torch.no_grad()
def _copy(module: nn.Module, new: nn.Module, names: Collection[str] | None = None) -> None:
    """Give the tensors of `module`, or those of these names, the values that they have in `new`."""
    values = dict(_tensors(new))
    for name, t in _tensors(module):
        if names is None or name in names:
            t.copy_(fitted(values[name], t))


def _reset(module: nn.Module, make: Make, path: str) -> None:
    """`reset_parameters` of a block, or of the layer at `path` in it. On the meta device, there are no values to set."""
    if not is_on_meta(module):
        _copy(module, make("cpu", data_type(module)).get_submodule(path))


def _leave_meta(block: nn.Module, device: Any, dtype: torch.dtype | None = None) -> None:
    """Give the tensors of a block that are on the meta device memory, and the values of their start."""
    names = {name for name, t in _tensors(block) if t.is_meta}

    def real(t: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(t, device=device, dtype=dtype if t.is_floating_point() else None) if t.is_meta else t

    super(_Starting, block)._apply(real)  # type: ignore[misc]
    _copy(block, started(block, "cpu"), names)
    settle(block)


def _before_call(block: nn.Module, args: tuple[Any, ...]) -> None:
    """Hook of a block that was made on the meta device: it may be there still, while the base has got its weights.

    A layer on the meta device computes garbage from a tensor that is not there, without an error.
    """
    x = next((a for a in args if isinstance(a, torch.Tensor)), None)
    if x is None or x.is_meta:
        return
    if is_on_meta(block):
        _leave_meta(block, x.device, None if torch.is_autocast_enabled(x.device.type) else x.dtype)
    settle(block)
