"""The arguments of a recorded call, as a trace takes them: tensors become placeholders, all else are constants."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from ..errors import Refusal
from .author_code import compared_with_none
from .calls import Call

STARS: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


@dataclasses.dataclass(frozen=True)
class Unpacked:
    """Stands among the constants for an argument that is a list or tuple of tensors and sizes, of fixed length.

    A forward that asks whether its argument is a list must see one while it is traced. `items` are None, or an
    `Unpacked` for an item that is a list itself.
    """

    kind: type
    items: tuple[Unpacked | None, ...]

    @classmethod
    def like(cls, value: Any) -> Unpacked | None:
        """For a list or tuple of tensors, sizes and such lists; None for anything else."""
        if type(value) not in (list, tuple, torch.Size) or not value:
            return None
        items = [cls.like(v) for v in value]
        if any(i is None and not isinstance(v, torch.Tensor) and type(v) is not int for i, v in zip(items, value)):
            return None
        return cls(list if type(value) is list else tuple, tuple(items))

    def of(self, proxy: Any) -> Any:
        """The items of a traced argument, in the container that the forward expects."""
        return self.kind(proxy[i] if item is None else item.of(proxy[i]) for i, item in enumerate(self.items))


def bound(call: Call) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a call's arguments into constants and tensors, both by parameter name."""
    signature = signature_of(type(call.module).forward)
    given = signature.bind(call.module, *call.args, **call.kwargs)
    given.apply_defaults()
    constants, values = {}, {}
    for i, (name, value) in enumerate(given.arguments.items()):
        if i == 0:  # self
            continue
        values[name] = value
        unpacked = Unpacked.like(value)
        if unpacked is not None:
            constants[name] = unpacked
        elif not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value)):
            constants[name] = value
    return constants, values


def pinned(module_class: Any, constants: dict[str, Any]) -> dict[str, Any]:
    """The constants that a trace cannot leave open: lists of tensors, whose length it holds, and variadic arguments."""
    parameters = signature_of(module_class.forward).parameters
    return {k: v for k, v in constants.items() if isinstance(v, Unpacked) or parameters[k].kind in STARS}


def variadic_keywords(module_class: Any) -> str | None:
    """The name of the parameter ``**kwargs`` of a class's forward; None where there is none."""
    parameters = signature_of(module_class.forward).parameters.values()
    return next((p.name for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD), None)


def optional_tensors(module_class: Any, constants: dict[str, Any], graphs: Iterable[fx.Graph]) -> tuple[str, ...]:
    """The arguments that may be None, were tensors in the recorded call, and are used in a trace.

    One may be None that is so by default, or that the forward compares with None.
    """
    used = {n.target for graph in graphs for n in graph.nodes if n.op == "placeholder" and n.users}
    parameters, asked = signature_of(module_class.forward).parameters, compared_with_none(module_class)
    return tuple(name for name, p in parameters.items() if name in used - constants.keys() and (
        p.default is None or name in asked))


def is_plain(value: Any) -> bool:
    """Whether a call can compare an argument with its value in the trace."""
    if isinstance(value, (tuple, list)):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(map(is_plain, value.values()))
    return value is None or isinstance(value, (bool, int, float, str, Unpacked))


@functools.lru_cache(maxsize=1024)
def signature_of(function: Any) -> inspect.Signature:
    """
    Raises:
        Refusal: It is no function, but a property, say; or a decorator of it has an argument of its own.
    """
    try:
        signature = inspect.signature(function)
        while hasattr(function, "__wrapped__"):
            outer = inspect.signature(function, follow_wrapped=False).parameters
            own = [p.name for i, p in enumerate(outer.values()) if p.kind not in STARS and p.name not in signature.parameters
                   and (i >= len(signature.parameters) or p.kind is inspect.Parameter.KEYWORD_ONLY)]
            if own:
                raise Refusal(f"a decorator of its forward has an argument of its own, {own[0]}")
            function = function.__wrapped__
    except (TypeError, ValueError) as error:
        raise Refusal(f"its forward has no signature: {error}") from error
    return signature
