"""timm's tables of models with the twins in them.

The entry of a twin is derived from its base's whenever it is read, so that a model which is registered, overwritten or
tagged later needs nothing more. The alias without a slash is a key like the name, and is listed where it is asked for.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Container, Iterable, Iterator, MutableSet, Set
from typing import Any

from .errors import SEInjectError
from .timm_names import ALIAS, PREFIX, base_name
from .undo import undone

MODULE = "se_inject"  # the Python module of the twins, in timm's tables
_listed: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("se_inject_listed", default=(PREFIX,))


def base_of_twin(name: object) -> str | None:
    """The name of the base, with the tag if there is one, for the name of a twin; None for other names."""
    return base_name(name) if isinstance(name, str) and name.startswith((PREFIX, ALIAS)) else None


@contextlib.contextmanager
def listing_aliases() -> Iterator[None]:
    """Inside, the tables list the aliases, too."""
    before = _listed.get()
    with undone(lambda: _listed.set(before)):
        _listed.set((PREFIX, ALIAS))
        yield


class _Names:
    """The names of a table: those of the bases in `data`, and of their twins. timm's deprecated names have no twins."""

    data: Any
    deprecated: Container[str]

    def _has_twin(self, base: str) -> bool:
        return base in self.data and base.partition(".")[0] not in self.deprecated

    def __contains__(self, name: object) -> bool:
        base = base_of_twin(name)
        return name in self.data if base is None else self._has_twin(base)

    def __iter__(self) -> Iterator[str]:
        names = list(self.data)  # at once, because another thread may register a model
        yield from names
        for prefix in _listed.get():
            yield from (prefix + name for name in names if self._has_twin(name))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class TwinTable(_Names, collections.UserDict[str, Any]):
    """A dict of timm's, by the names of models. `entry` makes a twin's of the twin's name and the base's entry.

    Raises:
        SEInjectError: The dict has a name that is a twin's.
    """

    def __init__(
        self, table: dict[str, Any], deprecated: Container[str] = (),
        entry: Callable[[str, Any], Any] = lambda name, of_base: of_base,
    ) -> None:  # fmt: skip
        taken = next((n for n in table if base_of_twin(n)), None)
        if taken is not None:
            raise SEInjectError(
                f"timm already has a model named {taken!r}, and se_inject needs this name for the twin of "
                f"{base_of_twin(taken)!r}: register that model under another name")
        self.data, self.deprecated, self._entry = table, deprecated, entry

    def __getitem__(self, name: str) -> Any:
        base = base_of_twin(name)
        if base is None:
            return self.data[name]
        if self._has_twin(base):
            return self._entry(name, self.data[base])
        default = getattr(self.data, "default_factory", None)  # timm 1.0.15 asks for the tags of models that have none
        if default is None:
            raise KeyError(name)
        return self._entry(name, default())

    def get(self, name: str, default: Any = None) -> Any:  # for a defaultdict: reading adds nothing
        return self[name] if name in self else default  # noqa: SIM401 (this is the get that it asks for)


class TwinEntrypoints(TwinTable):
    """timm's functions that create models. It refuses further models with the names of twins."""

    def __setitem__(self, name: str, fn: Any) -> None:
        base = base_of_twin(name)
        if base is not None:
            raise SEInjectError(
                f"the model name {name!r} belongs to se_inject, which derives it from {base!r}: "
                "register the model under a name without that prefix")
        super().__setitem__(name, fn)


class TwinSet(_Names, MutableSet[str]):
    """A set of timm's, of names of models."""

    def __init__(self, names: set[str], deprecated: Container[str]) -> None:
        self.data, self.deprecated = names, deprecated

    @classmethod
    def _from_iterable(cls, it: Iterable[Any]) -> Any:
        return set(it)

    def add(self, name: str) -> None:
        self.data.add(name)

    def discard(self, name: str) -> None:
        self.data.discard(name)

    def intersection(self, names: Iterable[str]) -> set[str]:
        return {name for name in names if name in self}


class TwinsOf(Set[str]):
    """The names of the twins in a table: the models of the Python module se_inject."""

    def __init__(self, table: TwinTable) -> None:
        self._table = table

    @classmethod
    def _from_iterable(cls, it: Iterable[Any]) -> Any:
        return set(it)

    def __contains__(self, name: object) -> bool:
        return base_of_twin(name) is not None and name in self._table

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._table if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def tags_of_twin(name: str, tags: list[str]) -> list[str]:
    """The names of a twin with its tags, from those of the base."""
    prefix = name.removesuffix(base_name(name))
    return [prefix + tag for tag in tags]


def cfg_of_twin(name: str, cfg: Any) -> Any:
    """timm's `PretrainedCfg` of a twin, from that of the base."""
    return dataclasses.replace(cfg, architecture=PREFIX + base_name(name).partition(".")[0])
