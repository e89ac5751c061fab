"""Prefixes that wrappers put before all names of a state dict, such as Lightning's ``model.`` and DDP's ``module.``.

Only the model tells a prefix from the name of a child, so that a prefix comes off where the names then are the model's.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable

from .parts import Parts


def common_prefixes(names: Collection[str]) -> list[str]:
    """The dotted prefixes that all names have, the shortest first; always the empty one, never a whole name."""
    if not names:
        return [""]
    first, last = (name.split(".")[:-1] for name in (min(names), max(names)))  # what these share, all others have
    shared = [a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last))]
    return ["", *itertools.accumulate(f"{part}." for part in shared)]


def likely_prefix(names: Collection[str], own: Collection[str], now: str = "") -> str:
    """The prefix of `names` without which most of them are among `own`, for a caller who then checks each name.

    Args:
        names: Names in a file.
        own: The model's names.
        now: The prefix that is taken unless another one is better.
    """
    def matches(prefix: str) -> tuple[int, bool]:
        return sum(name[len(prefix):] in own for name in names), prefix == now

    return max(common_prefixes(names), key=matches)  # of equal ones, the shortest


def certain_prefix(names: Collection[str], parts: Parts) -> str:
    """The shortest prefix without which `names` fit a model: they are its own, or they have its whole base.

    It is empty where no prefix does this, or where `names` fit as they are.
    """
    def fit(prefix: str) -> bool:
        short = {name[len(prefix):] for name in names}
        return short <= own or base <= short

    own = parts.everything().keys()
    base = {key for key in parts.base if not key.endswith("num_batches_tracked")}
    return next(filter(fit, common_prefixes(names)), "")


def prefix_of_some(names: Iterable[str], own: Collection[str]) -> str | None:
    """The prefix under which a part of `names` has the most of the model's; None if no prefix has any."""
    counts: dict[str, int] = {}
    for name in names:
        path = name.partition(".")[0]
        while len(path) < len(name):
            if name[len(path) + 1:] in own:
                counts[f"{path}."] = counts.get(f"{path}.", 0) + 1
            path = name[:len(path) + 1 + len(name[len(path) + 1:].partition(".")[0])]
    return max(counts, key=lambda p: (counts[p], -len(p)), default=None)
