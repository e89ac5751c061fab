"""Timing side by side: every round calls all contestants, so that what slows the machine slows them alike."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch

FEWEST = 5  # rounds, where their number is not given
TURN = 0.1  # seconds that a contestant is called for before the next has its turn, in whole calls


@dataclasses.dataclass(frozen=True)
class Job:
    """What is timed: `run`, called with what `setup` returns, which is not timed and precedes each single call."""

    run: Callable[[Any], object]
    setup: Callable[[], Any] | None = None

    def __call__(self) -> object:
        return self.run(self.setup() if self.setup else None)


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, q1, q3)


def ratios(times: Mapping[str, Sequence[float]], name: str, to: str) -> Spread:
    """Of the seconds of two contestants, divided round by round."""
    return Spread.of([a / b for a, b in zip(times[name], times[to])])


def clock(device: torch.device) -> Callable[[], float]:
    """Seconds, read when the device has done what it was given."""
    if device.type in ("cpu", "meta"):
        return time.perf_counter

    def synchronised() -> float:
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    return synchronised


def interleaved(
    jobs: Mapping[str, Job], *, rounds: int | None = None, min_time: float = 3.0, now: Callable[[], float] = time.perf_counter,
    advance: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Time `jobs` in rounds, each of which gives every job one turn; the order is rotated, and turned round every other time.

    A turn is one call, or for jobs without a setup as many as take `TURN` seconds, divided by their number. Every job is
    called twice before that, once to warm up and once to learn how long it takes.

    Args:
        jobs: By name.
        rounds: How many; None is as many as give a job `min_time` seconds on average, and at least `FEWEST`.
        min_time: Seconds, where `rounds` does not say.
        now: The clock.
        advance: Called after each turn.

    Returns:
        Seconds per call, for each job by round.
    """
    calls, estimates = {}, []
    for name, job in jobs.items():
        job()
        seconds = _turn(job, 1, now)
        calls[name] = 1 if job.setup else max(1, math.ceil(TURN / max(seconds, 1e-9)))
        estimates.append(seconds * calls[name])
    if rounds is None:
        rounds = max(FEWEST, math.ceil(min_time * len(jobs) / max(sum(estimates), 1e-9)))
    times: dict[str, list[float]] = {name: [0.0] * rounds for name in jobs}
    for i in range(rounds):
        for name in order(list(jobs), i):
            times[name][i] = _turn(jobs[name], calls[name], now)
            advance()
    return times


def order(names: Sequence[str], turn: int) -> list[str]:
    """The order of a round: each name comes first as often as any other, and after and before its neighbours alike."""
    at = turn // 2 % len(names)
    rotated = [*names[at:], *names[:at]]
    return rotated[::-1] if turn % 2 else rotated


def _turn(job: Job, calls: int, now: Callable[[], float]) -> float:
    given = None
    if job.setup:
        given = job.setup()
        gc.collect()  # what others left is not this job's work
    start = now()
    for _ in range(calls):
        result = job.run(given)
    seconds = (now() - start) / calls
    del result, given
    return seconds


def peak_memory(job: Job, device: torch.device) -> int | None:
    """Bytes that one call of `job.run` holds at most, beyond what is allocated before it; None on the meta device.

    It is what torch's allocator gives out: scratch memory of libraries that bring their own is not counted.
    """
    given = job.setup() if job.setup else None
    if device.type == "meta":
        return None
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
        before = torch.accelerator.memory_allocated(device)
        torch.accelerator.reset_peak_memory_stats(device)
        job.run(given)
        torch.accelerator.synchronize(device)
        return torch.accelerator.max_memory_allocated(device) - before
    from torch.autograd.profiler import MEMORY_EVENT_NAME, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # it talks on stderr
    with profile(profile_memory=True) as recorded:
        job.run(given)
    assert recorded.kineto_results is not None
    now = peak = 0
    events = [e for e in recorded.kineto_results.events() if e.name() == MEMORY_EVENT_NAME]
    for event in sorted(events, key=lambda e: int(e.start_ns())):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def peak_resident(job: Job) -> int | None:
    """Bytes by which one call of `job.run` lets the process grow at most; None where the system is not Linux.

    Memory that files are mapped to counts when it is read.
    """
    given = job.setup() if job.setup else None
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # else glibc hands out again what it has kept, and the process does not grow
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak is from now on
        before = _status("VmRSS")
        result = job.run(given)
        peak = _status("VmHWM") - before
    except (OSError, KeyError):
        return None
    del result
    return max(peak, 0)


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        said = dict(line.split(":", 1) for line in file)
    return int(said[key].split()[0]) * 1024


@contextlib.contextmanager
def watched(module: ModuleType, names: Sequence[str]) -> Iterator[dict[str, list[float]]]:
    """Inside, the seconds of each call of a module's functions are kept, by the function's name."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    functions = {name: getattr(module, name) for name in names}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name].append(time.perf_counter() - start)

        return wrapper

    try:
        for name, function in functions.items():
            setattr(module, name, timed(name, function))
        yield seconds
    finally:
        for name, function in functions.items():
            setattr(module, name, function)
