"""Every model of a library, one row each: what was injected, or why it was refused."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import TimeoutError as PoolTimeoutError
from concurrent.futures import as_completed
from typing import Any

import torch
from torch import nn

from ..capture import recording
from ..capture.example import Example
from ..capture.inputs import smallest_input, without_values
from ..capture.meta_ops import MetaOps
from ..capture.snapshot import on_meta
from ..capture.values import equal
from ..config import SEConfig
from ..errors import SEInjectError
from ..find.plan import Plan
from ..private import home_of
from ..surgery.pipeline import Prepared, apply, eject, prepare
from ..surgery.refusals import no_sites
from ..timm_names import PREFIX
from .outputs import run
from .zoo_table import Row, counts_text

TORCHVISION = "torchvision/"


def names(pattern: str) -> list[str]:
    """The names that match: of timm's models, or, for ``torchvision/...``, of torchvision's classifiers.

    Raises:
        SEInjectError: torchvision is not installed.
    """
    if pattern.startswith(TORCHVISION):
        try:
            import torchvision
        except ImportError as error:
            raise SEInjectError(f"{pattern!r} needs the package torchvision: pip install 'se-inject[zoo]'") from error
        found = [TORCHVISION + n for n in torchvision.models.list_models(module=torchvision.models)]
        return fnmatch.filter(found, pattern)
    import timm

    return [n for n in timm.list_models(pattern) if not n.startswith(PREFIX)]


def family(name: str) -> str:
    """The Python module that defines a model."""
    if name.startswith(TORCHVISION):
        import torchvision

        builder = torchvision.models.get_model_builder(name.removeprefix(TORCHVISION))
        return TORCHVISION + str(builder.__module__).rpartition(".")[2]
    return str(home_of(name))


def create(name: str) -> nn.Module:
    """The model with random weights, on the default device."""
    if name.startswith(TORCHVISION):
        import torchvision

        bare = name.removeprefix(TORCHVISION)
        args = {"init_weights": False} if bare in ("googlenet", "inception_v3") else {}  # torchvision warns without it
        model: nn.Module = torchvision.models.get_model(bare, weights=None, **args)
        return model
    import timm

    return timm.create_model(name)


def answer(name: str, placement: str = "auto", verify: str = "meta") -> Row:
    """Plan, inject, run and eject one model. An error is a row, too.

    Args:
        name: See `names`.
        placement: As in `SEConfig`.
        verify: ``meta`` runs the model without computing; ``cpu`` compares its outputs before and after the injection,
            on its smallest input.
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
            row, params=plan.params, macs=plan.macs, sites=counts_text(plan.kinds()), skipped=_skipped(plan))
        if not prepared.jobs:
            row = dataclasses.replace(row, status="refused", reason=str(no_sites(model, plan)).partition(": ")[2])
        else:
            _inject_and_compare(model, prepared, verify)
            row = dataclasses.replace(
                row, status="injected", added_params=plan.added_params, added_macs=plan.added_macs)
    except Exception as error:  # the other models still get their rows
        row = dataclasses.replace(row, status="failed", reason=f"{type(error).__name__}: {error}")
    return dataclasses.replace(
        row, reason=" ".join(row.reason.split()), seconds=round(time.perf_counter() - start, 2))


def _skipped(plan: Plan) -> str:
    return counts_text(Counter(s.reason.partition(" at ")[0] for s in plan.skipped if s.reason is not None))


def _inject_and_compare(model: nn.Module, prepared: Prepared, verify: str) -> None:
    """Inject, run and eject.

    Raises:
        SEInjectError: An output, the number of parameters, a class or a key is not as expected.
    """
    classes, keys = [type(m) for m in model.modules()], list(model.state_dict())
    images = torch.randn(2, *prepared.plan.input_size, device=verify)
    before = run(model.eval(), images) if verify == "cpu" else None
    with MetaOps() if verify == "meta" else contextlib.nullcontext():
        apply(model, prepared)
    if verify == "meta":
        with on_meta(model):
            recording.run(model, Example((images,)), MetaOps(factories=True))
    elif not equal(before, run(model, images)):
        raise SEInjectError("the injected model's outputs differ from the base's")
    if sum(p.numel() for p in model.parameters()) != prepared.plan.params + prepared.plan.added_params:
        raise SEInjectError("the plan's count of new parameters is wrong")
    eject(model)
    if [type(m) for m in model.modules()] != classes or list(model.state_dict()) != keys:
        raise SEInjectError("the ejected model is not the base")


def survey(
    wanted: list[str], done: Iterable[Row] = (), *, placement: str = "auto", verify: str = "meta",
    jobs: int = 2, timeout: float = 300.0,
) -> Iterator[Row]:  # fmt: skip
    """Answer for each model in `wanted` that `done` lacks, in worker processes. Yields the rows as they are finished.

    A worker that crashes, or takes longer than `timeout` seconds for a model, gives one failed row.
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

    gc.freeze()  # imported objects live on: no collection needs to visit them
    gc.set_threshold(200_000)  # graphs are many small objects that are freed together: collect rarely
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # a library's deprecation warnings about its own models
