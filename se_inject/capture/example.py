"""What a model is run on: images of one size, or inputs of any structure, as shapes and data types without values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import ConfigError
from .channels import BATCH_AXIS, CHANNEL_AXIS, mark

BATCH = 2  # images in a recorded run; more than one, so that no size of 1 stands for two things
_PLAIN = (bool, int, float, str, type(None))
_EXPECTED = "a tensor, a tuple of arguments, or a dict of keyword arguments, as in example_inputs={'pixel_values': images}"


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """The arguments of one call of a model: plain values and tensors, in lists, tuples and dicts."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    channels_second: bool = False  # else a convolution says where the channels are

    @classmethod
    def of(cls, inputs: object, on_meta: bool = True) -> Example:
        """What a user gives: a tensor, a tuple of arguments, a dict of keyword arguments, or a list as the only argument.

        Raises:
            ConfigError: It is something else, has no tensor, or holds a value that no file could.
        """
        given = inputs if isinstance(inputs, tuple) else dict(inputs) if isinstance(inputs, Mapping) else (inputs,)
        for value in tree_leaves(given):
            if not isinstance(value, (torch.Tensor, *_PLAIN)):
                raise ConfigError(
                    f"example_inputs has a value of class {type(value).__name__}: expected {_EXPECTED}, of tensors, numbers, "
                    "texts, None, and lists, tuples and dicts of these")
        if not any(isinstance(value, torch.Tensor) for value in tree_leaves(given)):
            raise ConfigError(f"example_inputs={inputs!r} has no tensor: expected {_EXPECTED}")
        if isinstance(given, dict) and not all(isinstance(name, str) for name in given):
            raise ConfigError(f"example_inputs has the keys {list(given)}: a dict gives keyword arguments, by their names")
        made = cls((), given) if isinstance(given, dict) else cls(given)
        return made.on_meta() if on_meta else made

    @classmethod
    def images(cls, size: tuple[int, ...], dtype: torch.dtype) -> Example:
        """A batch of images, volumes or signals of this (C, H, W), (C, D, H, W) or (C, L)."""
        return cls((torch.empty(BATCH, *size, device="meta", dtype=dtype),), channels_second=True)

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [t for t in tree_leaves((self.args, dict(self.kwargs))) if isinstance(t, torch.Tensor)]

    @property
    def _largest(self) -> torch.Tensor:
        """The images, as far as one can tell."""
        return max(self.tensors, key=lambda t: (t.is_floating_point(), t.dim() >= 3, t.numel()))

    @property
    def _is_list(self) -> bool:
        """Whether the images come one by one in a list, as torchvision's detectors take them."""
        return any(isinstance(value, list) for value in (*self.args, *self.kwargs.values())) and self._largest.dim() == 3

    @property
    def size(self) -> tuple[int, ...]:
        """(C, H, W) of the images."""
        return tuple(self._largest.shape[0 if self._is_list else 1:])

    @property
    def batch(self) -> int:
        """The number of images."""
        return sum(t.dim() == 3 for t in self.tensors) if self._is_list else max(1, *self._largest.shape[:1])

    def enlarged(self) -> Example:
        """The same for more than one image, where it has one: no size of 1 may stand for two things."""
        if self._is_list or any(t.dim() == 0 or t.shape[0] != 1 for t in self.tensors):
            return self
        return self._with(lambda t: t.new_empty((BATCH, *t.shape[1:])))

    def filled(self, device: torch.device, seed: int = 0) -> Example:
        """The same with random images on a device; other numbers are 0."""
        generator = torch.Generator().manual_seed(seed)

        def values(t: torch.Tensor) -> torch.Tensor:
            zeros = torch.zeros(t.shape, dtype=t.dtype)
            random = torch.randn(t.shape, generator=generator).to(t.dtype) if t.is_floating_point() else zeros
            return random.to(device)

        return self._with(values)

    def on_meta(self) -> Example:
        return self._with(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta"))

    def to(self, device: torch.device) -> Example:
        return self._with(lambda t: t.to(device))

    def double(self) -> Example:
        return self._with(lambda t: t.double() if t.is_floating_point() else t)

    def _with(self, make: Callable[[torch.Tensor], torch.Tensor]) -> Example:
        args, kwargs = tree_map(lambda v: make(v) if isinstance(v, torch.Tensor) else v, (self.args, dict(self.kwargs)))
        return Example(args, kwargs, self.channels_second)

    def marked(self) -> Example:
        """The same as new tensors, with the axes of batch and channels marked, and in containers that a model may change."""
        new = self._with(torch.empty_like)
        for t in new.tensors:
            if t.dim() > 0 and not self._is_list:
                mark(t, 0, BATCH_AXIS)
            if self.channels_second:
                mark(t, 1, CHANNEL_AXIS)
        return new

    def run(self, model: nn.Module) -> Any:
        return model(*self.args, **self.kwargs)

    def __str__(self) -> str:
        shown = tree_map(_shown, (self.args, dict(self.kwargs)))
        parts = [*map(str, shown[0]), *(f"{name}={value}" for name, value in shown[1].items())]
        return "an input of shape " + parts[0] if len(parts) == 1 and not self.kwargs else f"inputs ({', '.join(parts)})"


Inputs = tuple[int, ...] | Example | None  # what a user may ask for: a size, example inputs, or the model's own size


def to_json(inputs: Inputs) -> Any:
    """JSON types from which `from_json` makes the same."""
    if not isinstance(inputs, Example):
        return None if inputs is None else list(inputs)
    return {"args": [_to_json(a) for a in inputs.args], "kwargs": {name: _to_json(a) for name, a in inputs.kwargs.items()}}


def from_json(said: Any) -> Inputs:
    """What `to_json` wrote.

    Raises:
        ValueError, TypeError, OverflowError: It is something else.
    """
    if not isinstance(said, dict):
        return None if said is None else tuple(map(int, said))
    if said.keys() != {"args", "kwargs"} or not isinstance(said["kwargs"], dict):
        raise ValueError(f"no example inputs: {said!r}")
    return Example(tuple(map(_from_json, said["args"])), {str(k): _from_json(v) for k, v in said["kwargs"].items()})


def asked(input_size: object, example_inputs: object) -> Inputs:
    """What the arguments of a public function ask for.

    Raises:
        ConfigError: Both are given, or one is not valid.
    """
    if example_inputs is not None:
        if input_size is not None:
            raise ConfigError("input_size and example_inputs: give one of them; example_inputs has a size of its own")
        return Example.of(example_inputs)
    return None if input_size is None else checked_size(input_size)


def checked_size(size: object) -> tuple[int, ...]:
    if isinstance(size, (tuple, list)) and 2 <= len(size) <= 4 and all(type(n) is int and n > 0 for n in size):
        return tuple(size)
    raise ConfigError(
        f"input_size={size!r}: expected (C, H, W), three whole numbers above 0, such as (3, 224, 224); (C, L) for signals and "
        "(C, D, H, W) for volumes; give example_inputs= for inputs of another kind")


def _shown(value: Any) -> Any:
    return _Words(str(tuple(value.shape))) if isinstance(value, torch.Tensor) else _Words(repr(value))


class _Words(str):
    __repr__ = str.__str__


def _to_json(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, dict):
        return {"dict": {name: _to_json(v) for name, v in value.items()}}
    if isinstance(value, tuple):
        return {"tuple": list(map(_to_json, value))}
    return list(map(_to_json, value)) if isinstance(value, list) else value


def _from_json(said: Any) -> Any:
    if isinstance(said, list):
        return list(map(_from_json, said))
    if not isinstance(said, dict):
        return said
    if said.keys() == {"tuple"}:
        return tuple(map(_from_json, said["tuple"]))
    if said.keys() == {"dict"}:
        return {str(name): _from_json(v) for name, v in said["dict"].items()}
    dtype = getattr(torch, str(said.get("dtype")), None)
    shape = said.get("shape")
    if not isinstance(dtype, torch.dtype) or not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"no tensor: {said!r}")
    if math.prod(shape) > 1 << 48:
        raise ValueError(f"a tensor of shape {shape}")
    return torch.empty(shape, dtype=dtype, device="meta")
