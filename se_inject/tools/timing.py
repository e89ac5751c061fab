"""Timing side by side: each round calls every job, so that a slow spell of the machine slows all of them alike."""

from __future__ import annotations

import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

FEWEST = 5  # rounds, where their number is not given
TURN = 0.1  # seconds: a shorter job is called several times in its turn


@dataclasses.dataclass(frozen=True)
class Job:
    """A call to time.

    Attributes:
        run: The call. Its argument is the result of `setup`, or None.
        setup: Called before each single call of `run`, and not timed.
    """

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
    """The times of the job `name` over those of the job `to`, divided round by round."""
    return Spread.of([a / b for a, b in zip(times[name], times[to])])


def clock(device: torch.device) -> Callable[[], float]:
    """A clock in seconds that waits until the device has finished its work."""
    if device.type in ("cpu", "meta"):
        return time.perf_counter

    def synchronized() -> float:
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    return synchronized


def interleaved(
    jobs: Mapping[str, Job], *, rounds: int | None = None, min_time: float = 3.0, now: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:  # fmt: skip
    """Time `jobs` in rounds. In each round every job has one turn; `order` says in which order.

    A job with a setup is called once in a turn; a job without is called as often as it takes to fill `TURN` seconds.
    Before the first round every job is called twice: once to warm up, and once to estimate its time.

    Args:
        jobs: By name.
        rounds: Their number; None is the number that gives a job `min_time` seconds on average, and at least `FEWEST`.
        min_time: In seconds; used where `rounds` is None.
        now: The clock.

    Returns:
        Seconds for one call, by job and round.
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
    return times


def order(names: Sequence[str], turn: int) -> list[str]:
    """The order of the jobs in round `turn`: rotated by one in every second round, and reversed in between.

    In `2 * len(names)` rounds each job comes first equally often, and before its neighbor as often as after it.
    """
    at = turn // 2 % len(names)
    rotated = [*names[at:], *names[:at]]
    return rotated[::-1] if turn % 2 else rotated


def _turn(job: Job, calls: int, now: Callable[[], float]) -> float:
    argument = None
    if job.setup:
        argument = job.setup()
        gc.collect()  # garbage of other jobs must not be collected in this job's time
    start = now()
    for _ in range(calls):
        result = job.run(argument)
    seconds = (now() - start) / calls
    del result, argument
    return seconds
