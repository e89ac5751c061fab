"""TODO"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from ..errors import SEInjectError

ERROR_NAME = "_se_error"


def guards_for(fixed: dict[str, Any], message: str) -> tuple[str, dict[str, Any]]:
    """Code that raises where an argument is not as it was fixed, and the names that it needs; `message` has a ``{name}``."""
    # torch.jit.script takes a global for undefined where it is None
    plain = {name: repr(value) for name, value in fixed.items() if value is None or type(value) in (bool, int)}
    names: dict[str, Any] = {
        ERROR_NAME: SEInjectError, **{f"_se_fixed_{name}": value for name, value in fixed.items() if name not in plain}}
    return "".join(
        f"    if {name} {'is not' if value is None or isinstance(value, bool) else '!='} "
        f"{plain.get(name, f'_se_fixed_{name}')}:\n"
        f"        raise {ERROR_NAME}({message.format(name=name)!r})\n"
        for name, value in fixed.items()), names


def guarded(source: str, fixed: dict[str, Any], message: str) -> tuple[str, dict[str, Any]]:
    """The source of a function that raises where an argument is not as it was fixed, and the names that it needs."""
    guards, names = guards_for(fixed, message)
    return with_guards(source, guards), names if fixed else {}


def with_guards(source: str, guards: str) -> str:
    if not guards:
        return source
    head, sep, body = source.partition("):\n")
    if not sep:
        head, sep, body = source.partition(":\n")
    return head + sep + guards + body


def derived(base: type[nn.Module], members: dict[str, Any]) -> type[nn.Module]:
    """A subclass with these members, under the name of its base."""
    own = {name for cls in base.__mro__ if cls not in (nn.Module, object) for name in cls.__dict__}
    copying = {} if own & {"__getstate__", "__deepcopy__", "__copy__"} else {"__deepcopy__": _deepcopy, "__copy__": _copy}
    return type(base.__name__, (base,), {
        "__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__, "_se_base": base,
        **copying, **members,
    })  # fmt: skip


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    new = type(self).__new__(type(self))
    memo[id(self)] = new
    new.__dict__.update(copy.deepcopy(_state(self), memo))
    return new


def _copy(self: nn.Module) -> nn.Module:
    new = type(self).__new__(type(self))
    new.__dict__.update(_state(self))
    return new


def _state(self: nn.Module) -> dict[str, Any]:
    """Without what `Module.compile` made, which calls this very module."""
    return {key: value for key, value in self.__dict__.items() if key != "_compiled_call_impl"}
