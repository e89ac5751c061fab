"""Every model of a library, one row each: what was injected, what was refused, and why."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import fnmatch
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import TimeoutError as PoolTimeoutError
from concurrent.futures import as_completed
from typing import Any

import torch
from torch import nn

from .config import SEConfig
from .errors import SEInjectError
from .meta import MetaOps
from .naming import PREFIX
from .planning import KINDS, Plan
from .record import abstract, run
from .surgery import apply, eject, input_sizes, no_sites_message, prepare, runs_on, without_values
from .writing import write_atomically

TORCHVISION = "torchvision/"
_TYPES = {"str": str, "int": int, "float": float}


@dataclasses.dataclass(frozen=True)
class Row:
    """The answer for one model.

    Attributes:
        model: The timm name, or ``torchvision/`` and torchvision's.
        family: The module that defines it.
        placement: As asked.
        status: ``injected``, ``refused`` or ``failed``; the last is a defect.
        reason: Why it was refused or failed.
        sites: Injected sites by kind, as in ``residual: 16``.
        skipped: Skipped sites by reason.
        params, macs: Of the model before: parameters, and multiply-adds for one image.
        added_params, added_macs: What the blocks add.
        seconds: Time for all of it, making the model included.
    """

    model: str
    family: str
    placement: str
    status: str
    reason: str = ""
    sites: str = ""
    skipped: str = ""
    params: int = 0
    added_params: int = 0
    macs: int = 0
    added_macs: int = 0
    seconds: float = 0.0

    @classmethod
    def fields(cls) -> list[str]:
        return [f.name for f in dataclasses.fields(cls)]

    def answer(self) -> tuple[object, ...]:
        """What must not change unannounced: everything but the time."""
        return dataclasses.astuple(dataclasses.replace(self, seconds=0.0))

    def count(self, kind: str) -> int:
        return dict(_parse_counts(self.sites)).get(kind, 0)


def _counts(counter: dict[str, int]) -> str:
    return "; ".join(f"{key}: {n}" for key, n in sorted(counter.items()))


def _parse_counts(text: str) -> Iterator[tuple[str, int]]:
    for item in text.split("; ") if text else ():
        key, _, n = item.rpartition(": ")
        yield key, int(n)


def names(pattern: str) -> list[str]:
    """The models whose names match, timm's or, for ``torchvision/...``, torchvision's classifiers."""
    if pattern.startswith(TORCHVISION):
        import torchvision

        found = [TORCHVISION + n for n in torchvision.models.list_models(module=torchvision.models)]
        return fnmatch.filter(found, pattern)
    import timm

    return [n for n in timm.list_models(pattern) if not n.startswith(PREFIX)]


def family(name: str) -> str:
    """The module that defines a model."""
    if name.startswith(TORCHVISION):
        import torchvision

        builder = torchvision.models.get_model_builder(name.removeprefix(TORCHVISION))
        return TORCHVISION + str(builder.__module__).rpartition(".")[2]
    from timm.models._registry import _model_to_module

    return str(_model_to_module[name])


def create(name: str) -> nn.Module:
    """The model with random weights, on the default device."""
    if name.startswith(TORCHVISION):
        import torchvision

        bare = name.removeprefix(TORCHVISION)
        weights = {"init_weights": False} if bare in ("googlenet", "inception_v3") else {}  # torchvision warns else
        model: nn.Module = torchvision.models.get_model(bare, weights=None, **weights)
        return model
    import timm

    return timm.create_model(name)


def answer(name: str, placement: str = "auto", verify: str = "meta") -> Row:
    """Plan, inject, run and eject one model.

    Args:
        name: See `names`.
        placement: As in `SEConfig`.
        verify: ``meta`` computes nothing; ``cpu`` compares the outputs of the model, before and after, on its
            smallest input.
    """
    start = time.perf_counter()
    row = Row(name, family(name), placement, "failed")
    config = SEConfig(placement=placement)
    try:
        model = without_values(lambda: create(name)) if verify == "meta" else create(name)
        size = smallest_input(model) if verify == "cpu" else None
        prepared = prepare(model, config, size, name)
        plan = prepared.plan
        row = dataclasses.replace(
            row, params=plan.params, macs=plan.macs, sites=_counts(plan.kinds()), skipped=_skipped(plan))
        if not prepared.jobs:
            row = dataclasses.replace(row, status="refused", reason=no_sites_message(plan).partition(": ")[2])
        else:
            _inject_and_compare(model, prepared, verify)
            row = dataclasses.replace(
                row, status="injected", added_params=plan.added_params, added_macs=plan.added_macs)
    except Exception as error:  # one row, not the end
        row = dataclasses.replace(row, status="failed", reason=f"{type(error).__name__}: {error}")
    return dataclasses.replace(
        row, reason=" ".join(row.reason.split()), seconds=round(time.perf_counter() - start, 2))


def _skipped(plan: Plan) -> str:
    return _counts(Counter(s.reason.partition(" at ")[0] for s in plan.skipped if s.reason is not None))


def _inject_and_compare(model: nn.Module, prepared: Any, verify: str) -> None:
    size = prepared.plan.input_size
    classes, keys = [type(m) for m in model.modules()], list(model.state_dict())
    x = torch.randn(2, *size, device=verify)
    before = None
    if verify == "cpu":
        model.eval()
        before = _run(model, x)
    with MetaOps() if verify == "meta" else contextlib.nullcontext():
        apply(model, prepared)
    if before is None:
        with abstract(model):
            run(model, x)
    elif not _equal(before, _run(model, x)):
        raise SEInjectError("the injected model's outputs differ from the base's")
    if sum(p.numel() for p in model.parameters()) != prepared.plan.params + prepared.plan.added_params:
        raise SEInjectError("the plan's count of new parameters is wrong")
    eject(model)
    if [type(m) for m in model.modules()] != classes or list(model.state_dict()) != keys:
        raise SEInjectError("the ejected model is not the base")


@torch.no_grad()
def _run(model: nn.Module, x: torch.Tensor) -> Any:
    torch.manual_seed(0)
    return model(x)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)


def smallest_input(model: nn.Module) -> tuple[int, ...]:
    """The smallest square (C, H, W), of sides that are usual, that the model takes; else its own size."""
    own = input_sizes(model)
    for side in (32, 64, 96, 128, 160, 192, 224, 256, 299):
        for channels in dict.fromkeys(size[0] for size in own):
            if side < own[0][1] and runs_on(model, (channels, side, side)):
                return channels, side, side
    return own[0]


def survey(
    wanted: list[str], done: Iterable[Row] = (), *, placement: str = "auto", verify: str = "meta",
    jobs: int = 2, timeout: float = 300.0,
) -> Iterator[Row]:  # fmt: skip
    """Answer for each of `wanted` that `done` lacks, in worker processes, in the order in which they end.

    A worker that crashes, or takes longer than `timeout` seconds for a model, is one failed row.
    """
    from multiprocessing import get_context

    try:
        from pebble import ProcessExpired, ProcessPool
    except ImportError as error:
        raise SEInjectError("the zoo needs the package pebble: pip install 'se-inject[zoo]'") from error

    have = {r.model for r in done}
    todo = [n for n in wanted if n not in have]
    with ProcessPool(max_workers=jobs, initializer=_start_worker, context=get_context("spawn")) as pool:
        futures: dict[Any, str] = {pool.schedule(answer, args=(n, placement, verify), timeout=timeout): n for n in todo}
        try:
            for future in as_completed(futures):
                name = futures[future]
                failed = Row(name, family(name), placement, "failed")
                try:
                    yield future.result()
                except PoolTimeoutError:
                    yield dataclasses.replace(failed, reason=f"took longer than {timeout:g} s", seconds=timeout)
                except ProcessExpired as error:
                    yield dataclasses.replace(failed, reason=f"its process ended with exit code {error.exitcode}")
        except BaseException:
            pool.stop()
            raise


def _start_worker() -> None:
    import gc
    import warnings

    gc.freeze()  # what was imported need not be looked through at each collection,
    gc.set_threshold(200_000)  # and graphs are many small objects that go all at once
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # a library's words about its own old names


def read(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a table that was written before; none where there is no file.

    Raises:
        SEInjectError: The file is no such table.
    """
    if not os.path.exists(path):
        return []
    with open(path, newline="") as f:
        reader = csv.DictReader(f)
        if reader.fieldnames != Row.fields():
            raise SEInjectError(f"{str(path)!r} is no table of the zoo: its columns are {reader.fieldnames}; name another file")
        rows = []
        for r in reader:
            with contextlib.suppress(TypeError, ValueError):  # a line cut off by an interruption
                rows.append(Row(**{f.name: _TYPES[str(f.type)](r[f.name]) for f in dataclasses.fields(Row)}))
        return rows


class Table:
    """A table on disk that grows by a line for each row, so that a run can be interrupted and go on."""

    def __init__(self, path: str | os.PathLike[str] | None, keep: list[Row]) -> None:
        self.path = path
        self.rows = list(keep)
        self._write()

    def add(self, row: Row) -> None:
        self.rows.append(row)
        if self.path is not None:
            with open(self.path, "a", newline="") as f:
                _writer(f).writerow(dataclasses.asdict(row))

    def finish(self) -> list[Row]:
        """Put the rows into the order of their names."""
        self.rows.sort(key=lambda r: (r.model, r.placement))
        self._write()
        return self.rows

    def _write(self) -> None:
        if self.path is None:
            return

        def write(temporary: str) -> None:
            with open(temporary, "w", newline="") as f:
                writer = _writer(f)
                writer.writeheader()
                writer.writerows(map(dataclasses.asdict, self.rows))

        write_atomically(self.path, write)


def _writer(f: Any) -> Any:
    return csv.DictWriter(f, Row.fields(), lineterminator="\n")


def differences(rows: list[Row], expected: list[Row]) -> list[str]:
    """Where two tables say different things of a model, in words; times are not compared."""
    old = {r.model: r for r in expected}
    new = {r.model: r for r in rows}
    out = [f"{n}: not in the expected table" for n in new if n not in old]
    for name in new:
        if name in old and new[name].answer() != old[name].answer():
            changed = [
                f"{f} was {getattr(old[name], f)!r}, is {getattr(new[name], f)!r}" for f in Row.fields()
                if f != "seconds" and getattr(old[name], f) != getattr(new[name], f)]
            out.append(f"{name}: {'; '.join(changed)}")
    return out


def page(rows: list[Row], command: str) -> str:
    """The rows as a Markdown page: by family, what was placed, and why models were refused."""
    status = Counter(r.status for r in rows)
    lines = [
        "# The zoo", "",
        f"{len(rows):,} models: {status['injected']:,} injected, {status['refused']:,} refused with a reason, "
        f"{status['failed']:,} failed. Made by", "", "```sh", command, "```", "",
        "A model is planned, injected, run and ejected, all on the meta device. Each row of the table is one model; "
        "this page sums them by family. Sites are counts over all models of the family.", "",
        f"| family | models | injected | refused | {' | '.join(KINDS.values())} | skipped | parameters added |",
        "|---|" + "---:|" * (len(KINDS) + 5),
    ]
    groups: dict[str, list[Row]] = defaultdict(list)
    for r in rows:
        groups[r.family].append(r)
    for name, group in sorted(groups.items()):
        injected = [r for r in group if r.status == "injected"]
        shares = sorted(r.added_params / r.params for r in injected)
        share = f"{shares[0]:+.1%} to {shares[-1]:+.1%}" if shares else ""
        counts = " | ".join(str(sum(r.count(k) for r in group) or "") for k in KINDS)
        skipped = sum(n for r in group for _, n in _parse_counts(r.skipped))
        lines.append(
            f"| {name} | {len(group)} | {len(injected) or ''} | {len(group) - len(injected) or ''} | {counts} | "
            f"{skipped or ''} | {share} |")
    lines += ["", "## Why models were refused", "", "| reason | models | families |", "|---|---:|---|"]
    reasons: dict[str, list[Row]] = defaultdict(list)
    for r in rows:
        if r.status != "injected":
            reasons[_without_numbers(r.reason)].append(r)
    for reason, group in sorted(reasons.items(), key=lambda item: -len(item[1])):
        lines.append(f"| {reason} | {len(group)} | {', '.join(sorted({r.family for r in group}))} |")
    lines += ["", "## Why sites were skipped", "", "| reason | sites | models | families |", "|---|---:|---:|---|"]
    sites: dict[str, list[tuple[Row, int]]] = defaultdict(list)
    for r in rows:
        for reason, n in _parse_counts(r.skipped):
            sites[reason].append((r, n))
    for reason, found in sorted(sites.items(), key=lambda item: -len(item[1])):
        families = sorted({r.family for r, _ in found})
        lines.append(f"| {reason} | {sum(n for _, n in found):,} | {len(found)} | {', '.join(families)} |")
    return "\n".join(lines) + "\n"


def write_page(path: str | os.PathLike[str], rows: list[Row], command: str) -> None:
    def write(temporary: str) -> None:
        with open(temporary, "w") as f:
            f.write(page(rows, command))

    write_atomically(path, write)


def _without_numbers(reason: str) -> str:
    return " ".join(w for w in reason.split() if not w.isdigit())
