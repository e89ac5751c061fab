"""A class made at run time: a subclass of an owner's own class with other methods, and how it is copied."""

from __future__ import annotations

import abc
import copy
import itertools
import linecache
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from torch import nn

from ..capture.arguments import Unpacked
from ..capture.passed_on import PassedOn
from ..errors import Refusal, SEInjectError
from .state import BASE

ERROR_NAME = "_se_error"


def guards_for(fixed: dict[str, Any], given: tuple[str, ...], message: str) -> tuple[str, dict[str, Any]]:
    """Code that raises where an argument differs from its fixed value, and the names that it needs.

    Args:
        fixed: Values by argument; any value is right for a `PassedOn`.
        given: Arguments that are tensors; None raises.
        message: The error's; it has a ``{name}``.
    """
    fixed = {name: value for name, value in fixed.items() if not isinstance(value, PassedOn)}
    # torch.jit.script takes a global for undefined where it is None
    plain = {name: repr(value) for name, value in fixed.items() if value is None or type(value) in (bool, int)}
    names: dict[str, Any] = {
        ERROR_NAME: SEInjectError, **{f"_se_fixed_{name}": value for name, value in fixed.items() if name not in plain
        and not isinstance(value, Unpacked)}}
    tests = {
        name: f"{name} is None or len({name}) != {len(value.items)}" if isinstance(value, Unpacked) else
        f"{name} {'is not' if value is None or isinstance(value, bool) else '!='} {plain.get(name, f'_se_fixed_{name}')}"
        for name, value in fixed.items()}
    tests |= {name: f"{name} is None" for name in given}
    return "".join(
        f"    if {test}:\n        raise {ERROR_NAME}({message.format(name=name)!r})\n" for name, test in tests.items()), names


def with_guards(source: str, guards: str) -> str:
    """The source of a function that begins with `guards`."""
    if not guards:
        return source
    head, sep, body = source.partition("):\n")
    if not sep:
        head, sep, body = source.partition(":\n")
    return head + sep + guards + body


Code = tuple[str, Mapping[str, Any]]  # the text of one or more methods, and the names that they use

_classes: dict[Hashable, type[nn.Module]] = {}
_numbers = itertools.count(1)


def generated(
    base: type[nn.Module], sources: Sequence[Code], members: Mapping[str, Any], key: Hashable = None
) -> type[nn.Module]:
    """The subclass of `base` with the functions of `sources` for methods, and with `members`.

    Equal sources with the same names give the same class; `key` tells apart what else differs in `members`.
    """
    texts = tuple((text, *sorted((name, id(value)) for name, value in names.items())) for text, names in sources)
    found = _classes.get((base, texts, key))
    if found is None:
        methods: dict[str, Any] = {}
        for text, names in sources:
            filename = f"<se_inject {base.__name__} {next(_numbers)}>"
            # the source stays readable: for tracebacks, and for torch.jit.script
            linecache.cache[filename] = (len(text), None, text.splitlines(True), filename)
            namespace = dict(names)
            # annotations are types, and no strings, as a trace of the methods copies them
            exec(compile(text, filename, "exec", dont_inherit=True), namespace)
            methods |= {k: v for k, v in namespace.items() if k not in names and k != "__builtins__"}
        found = _classes[base, texts, key] = derived(base, {**methods, **members})
    return found


def derived(base: type[nn.Module], members: Mapping[str, Any]) -> type[nn.Module]:
    """A subclass with these members, under the name of its base.

    It has no name to import, so `members` has a ``__reduce_ex__`` that pickles by the base. The author's ``__init_subclass__``
    and metaclass are not called, as they may refuse the class, or enter it into a registry under the name of its base.

    Raises:
        Refusal: The base has slots, so Python cannot make it the base of a class that is there.
    """
    own = {name for cls in base.__mro__ if cls not in (nn.Module, object) for name in cls.__dict__}
    copying = {} if own & {"__getstate__", "__deepcopy__", "__copy__"} else {"__deepcopy__": _deepcopy, "__copy__": _copy}
    metaclass = type(base)
    plain: Any = abc.ABCMeta if issubclass(metaclass, abc.ABCMeta) else type
    cls: type[nn.Module] = plain.__new__(metaclass, base.__name__, (nn.Module,), {
        "__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__, BASE: base,
        **copying, **members,
    })  # fmt: skip
    try:
        type.__setattr__(cls, "__bases__", (base,))
    except TypeError as error:
        raise Refusal(f"{base.__name__} cannot have a subclass: {error}") from error
    return cls


def new_of(cls: type[nn.Module]) -> nn.Module:
    """An empty module of a class; what pickles of generated classes begin with."""
    return cls.__new__(cls)


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
    """The attributes to copy; not what `Module.compile` made, which calls this very module."""
    return {key: value for key, value in self.__dict__.items() if key != "_compiled_call_impl"}
