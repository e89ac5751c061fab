"""Ratios are those of the same round, every job has its turn, and peaks are those of one call."""

import pytest
import torch

from se_inject.tools import timing
from se_inject.tools.memory import peak_memory, peak_resident
from se_inject.tools.timing import Job, Spread, interleaved, order, ratios


class Clock:
    """A clock that only jobs move on; from the fifth call of a job on it takes twice as long."""

    def __init__(self):
        self.seconds, self.log = 0.0, []

    def __call__(self):
        return self.seconds

    def job(self, name, seconds):
        def run(given):
            self.log.append(name)
            self.seconds += seconds * (1 if self.log.count(name) <= 4 else 2)

        return Job(run)


def test_ratios_come_from_the_same_round():
    clock = Clock()
    times = interleaved({"a": clock.job("a", 1.0), "b": clock.job("b", 3.0)}, rounds=6, now=clock)
    assert "".join(clock.log) == "aabb" + "abba" + "baab" + "abba"
    assert times == {"a": [1.0, 1.0, 2.0, 2.0, 2.0, 2.0], "b": [3.0, 3.0, 6.0, 6.0, 6.0, 6.0]}
    assert ratios(times, "b", "a") == Spread(3.0, 3.0, 3.0)
    assert Spread.of(times["a"]) == Spread(2.0, 1.25, 2.0)
    assert ratios({"a": [1.0, 2.0, 4.0], "b": [2.0, 2.0, 2.0]}, "b", "a") == Spread(1.0, 0.75, 1.5)


def test_short_calls_fill_a_turn():
    clock = Clock()
    times = interleaved({"short": clock.job("short", timing.TURN / 2), "long": clock.job("long", 1.0)}, rounds=1, now=clock)
    assert clock.log.count("short") == 2 + 2
    assert clock.log.count("long") == 2 + 1
    assert times == {"short": [pytest.approx(timing.TURN / 2)], "long": [1.0]}


@pytest.mark.parametrize("min_time, rounds", [(0.0, timing.FEWEST), (8.0, 8)])
def test_the_rounds_fill_the_time(min_time, rounds):
    clock = Clock()
    times = interleaved({"a": clock.job("a", 0.5), "b": clock.job("b", 1.5)}, min_time=min_time, now=clock)
    assert len(times["a"]) == len(times["b"]) == rounds


def test_what_a_call_is_given_is_not_timed():
    clock = Clock()

    def setup():
        clock.seconds += 100
        return "given"

    def run(given):
        assert given == "given"
        clock.seconds += 0.01

    times = interleaved({"a": Job(run, setup)}, rounds=3, now=clock)
    assert times["a"] == pytest.approx([0.01] * 3)
    assert clock.seconds == pytest.approx(5 * 100.01)


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_each_comes_first_as_often_as_any_other(count):
    names = list("abcdef"[:count])
    rounds = [order(names, i) for i in range(2 * count)]
    assert all(sorted(r) == names for r in rounds)
    assert sorted(r[0] for r in rounds) == sorted(names * 2)


def test_peak_memory_counts_what_is_alive_at_once():
    def run(_):
        a = torch.zeros(1000)
        b = torch.zeros(2000)
        del a
        c = torch.zeros(4000)
        return b, c

    assert 4 * 6000 <= peak_memory(Job(run), torch.device("cpu")) < 4 * 7000
    assert peak_memory(Job(run), torch.device("meta")) is None


def test_peak_resident_counts_what_is_written():
    grown = peak_resident(Job(lambda _: torch.ones(16_000_000).sum()))
    if grown is None:
        pytest.skip("the peak of a process is read where Linux says it, in /proc/self")
    assert grown >= 60_000_000
