"""Modules that differ in nothing but the values of their weights have one fingerprint, and one trace serves them all."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import nn

_UNSEEN = {"_parameters", "_buffers", "_modules", "training", "reset_parameters"}


def frozen(value: Any) -> Hashable:
    """A hashable stand-in for a value: equal where a traced forward could not tell two values apart.

    Tensors are compared by shape and dtype, as on the meta device; objects that are no plain values by identity.
    """
    if isinstance(value, torch.Tensor):
        return "tensor", type(value), tuple(value.shape), value.dtype, value.requires_grad
    if value is None or isinstance(value, (bool, int, float, str, type, torch.dtype)):
        return type(value), value
    if isinstance(value, (list, tuple)):
        return type(value), tuple(map(frozen, value))
    if isinstance(value, dict):
        return type(value), tuple((frozen(k), frozen(v)) for k, v in value.items())
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(map(frozen, value))
    if isinstance(value, slice):
        return slice, frozen((value.start, value.stop, value.step))
    if isinstance(value, functools.partial):
        return functools.partial, id(value.func), frozen(value.args), frozen(value.keywords)
    return "object", id(value)


class Fingerprints:
    """The fingerprints of a model's modules; modules with equal ones trace alike.

    Use it inside `on_meta`, where modules have one mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self._known: dict[nn.Module, Hashable] = {}
        self._numbers: dict[Hashable, int] = {}
        times = Counter(id(part) for m in model.modules() for _, part in _parts(m))
        self._shared = {part for part, n in times.items() if n > 1}
        self._places: dict[nn.Module, list[tuple[str, int]]] = {}

    def of(self, module: nn.Module) -> Hashable:
        if module not in self._known:
            own = tuple(
                (key, frozen(value)) for key, value in module.__dict__.items()
                if key not in _UNSEEN and not (key.endswith("hooks") or "_hooks_" in key))
            tensors = tuple(
                (name, frozen(t)) for d in (module._parameters, module._buffers) for name, t in d.items())
            children = tuple(
                (name, None if child is None else self.of(child)) for name, child in module._modules.items())
            key = (type(module), own, tensors, children, self._ties(module) if self._shared else ())
            self._known[module] = self._numbers.setdefault(key, len(self._numbers))
        return self._known[module]

    def _ties(self, module: nn.Module) -> Hashable:
        """The names inside a module that lead to one child or tensor, each with the first name that does."""
        first: dict[int, str] = {}
        ties = [(name, first.setdefault(part, name)) for name, part in self._shared_in(module)]
        return tuple((name, other) for name, other in ties if name != other)

    def _shared_in(self, module: nn.Module) -> list[tuple[str, int]]:
        if module not in self._places:
            found = self._places[module] = []
            for name, part in _parts(module):
                found += [(name, id(part))] if id(part) in self._shared else []
                if isinstance(part, nn.Module):
                    found += [(f"{name}.{inner}", number) for inner, number in self._shared_in(part)]
        return self._places[module]


def _parts(module: nn.Module) -> Iterator[tuple[str, object]]:
    """The tensors and the children that a module holds by name."""
    for d in (module._parameters, module._buffers, module._modules):
        yield from ((name, part) for name, part in d.items() if part is not None)
