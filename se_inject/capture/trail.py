"""The trail of a forward: the operators that ran, with their numbers, and which tensors went into which.

Two runs of a forward do the same where their trails are the same. Numbers are kept rather than the arguments: so many objects
would make Python's collector run.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)  # values that a call may pass, beside tensors
_NUMBER = "_se_number"  # in the dict of a tensor that an operator made
_numbers = itertools.count(1)
Step = tuple[int, tuple[int, ...], tuple[int, ...]]  # the digest of an operator, and the keys of what it reads and returns
UNKNOWN: Step = (0, (), ())  # an operator of a layer whose trail nobody asks for
CALL, RETURN = -1, -2  # stand for the digest where a child was called, and at the end
_WORDS = {CALL: "a layer", RETURN: "the output"}
_words: dict[int, str] = {}


def begin(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, tuple[int, ...]]:
    """The first two parts of an operator's step, to be taken before it runs, as it may change its arguments."""
    return _digest(func, args, kwargs), _keys((*args, *kwargs.values()) if kwargs else args)


def end(begun: tuple[int, tuple[int, ...]], out: Any) -> Step:
    """The step of an operator that returned `out`; new tensors get a number."""
    results = (out,) if isinstance(out, torch.Tensor) else out if isinstance(out, (list, tuple)) else ()
    return (*begun, numbered(results))


def _digest(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """A number for an operator and its arguments: the same for equal plain arguments, and tensors of equal shape and dtype."""
    number = hash((func, *map(_plain, args), *map(_plain, kwargs.items())))
    if number not in _words:
        if len(_words) > 20_000:
            _words.clear()
        _words[number] = str(func).removeprefix("aten.")
    return number


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    if isinstance(value, (bool, float)) or (type(value) is int and value == -1):
        return repr(value)  # Python gives -1 the hash of -2, and True and 1.0 that of 1
    return value if isinstance(value, Hashable) else repr(value)


def is_trusted(module: nn.Module) -> bool:
    """Whether a module is a single layer of torch's own, whose forward deceives no trace."""
    return not module._modules and type(module).__module__.startswith("torch.nn.modules.")


def key(t: torch.Tensor) -> int:
    """The identity of a tensor: by its number, or where no operator made it by its address, as it lives on."""
    number: int = t.__dict__.get(_NUMBER) or -id(t)
    return number


def _keys(values: Iterable[Any]) -> tuple[int, ...]:
    found: list[int] = []
    for v in values:
        if isinstance(v, torch.Tensor):
            found.append(key(v))
        elif isinstance(v, (list, tuple)):
            found.extend(key(w) for w in v if isinstance(w, torch.Tensor))
    return tuple(found)


def numbered(results: Iterable[Any]) -> tuple[int, ...]:
    """The keys of tensors that an operator or a child returned, or that a run begins with: they get a number."""
    found: list[int] = []
    for t in results:
        if isinstance(t, torch.Tensor):
            number = t.__dict__.get(_NUMBER)
            if number is None:
                number = t.__dict__[_NUMBER] = next(_numbers)
            found.append(number)
    return tuple(found)


def called(given: Sequence[Any], output: Iterable[Any]) -> Step:
    """The step of a forward that calls a child, from the values that the child gets and returns."""
    return _with_plain(CALL, given), _keys(given), numbered(output)


def returned(output: Sequence[Any]) -> Step:
    """The last step of a forward: the values that it returns."""
    return _with_plain(RETURN, output), _keys(output), ()


def _with_plain(what: int, values: Sequence[Any]) -> int:
    """The digest of a call or of a return, with the plain values among the `values`."""
    plain = [repr(v) for v in values if isinstance(v, PLAIN)]
    if not plain:
        return what
    number = hash((what, *plain))
    _words[number] = _WORDS[what]
    return number


def related(
    trail: Iterable[Step], given: Iterable[Any], module: nn.Module, same: Mapping[int, int] = MappingProxyType({})
) -> tuple[tuple[int, ...], ...]:  # fmt: skip
    """The steps of a forward with its tensors numbered as they appear, so that two runs of it can be compared.

    Args:
        trail: The steps of one run.
        given: The arguments of that run.
        module: Its parameters and buffers have numbers of their own.
        same: Keys of tensors, each with that of another that it counts as.
    """
    numbers: dict[int, int] = {}
    for k in _keys(given):
        numbers.setdefault(same.get(k, k), len(numbers))
    steps = []
    own = itertools.chain(module._parameters.values(), module._buffers.values())
    weights = {key(t): -1 - i for i, t in enumerate(own) if t is not None}
    for digest, sources, results in trail:
        keys: Sequence[int] = (*sources, *results)
        if same:
            keys = [same.get(k, k) for k in keys]
        for k in keys:
            if k not in numbers:
                if k < 0 and k not in weights:  # of a child, perhaps; a rare walk
                    for t in itertools.chain(module.parameters(), module.buffers()):
                        weights.setdefault(key(t), -1 - len(weights))
                numbers[k] = weights[k] if k in weights else len(numbers)
        steps.append((digest, *map(numbers.__getitem__, keys)))
    return tuple(steps)


def first_difference(a: Sequence[tuple[int, ...]], b: Sequence[tuple[int, ...]]) -> tuple[str, str] | None:
    """The first operators in which two runs differ, by name; None where the runs are the same."""
    if a == b:
        return None
    x, y = next((x, y) for x, y in itertools.zip_longest(a, b) if x != y)
    if x is not None and y is not None and x[0] == y[0]:
        return _word(x), f"{_word(y)} of other tensors"
    return _word(x), f"{_word(y)} with other values" if _word(x) == _word(y) else _word(y)


def _word(step: tuple[int, ...] | None) -> str:
    if step is None:
        return "nothing"
    return _WORDS.get(step[0]) or _words.get(step[0], "an operator")


def alike(a: Any, b: Any) -> bool:
    """Whether two arguments have the same structure, shapes and plain values."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.shape == b.shape
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(alike(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(alike, a, b))
    return repr(a) == repr(b) if isinstance(a, PLAIN) or isinstance(b, PLAIN) else True
