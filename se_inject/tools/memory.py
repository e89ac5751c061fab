"""The memory that one call takes at its peak."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from typing import Any

import torch

from .timing import Job


def peak_memory(job: Job, device: torch.device) -> int | None:
    """The peak in bytes of one call of `job.run`, beyond the memory allocated before it; None where torch does not count.

    The figure is that of torch's allocator. Libraries with an allocator of their own are not counted.
    """
    argument = job.setup() if job.setup else None
    if device.type != "cpu":
        of_device: Any = getattr(torch, device.type, None)  # such as torch.cuda
        if not hasattr(of_device, "max_memory_allocated"):
            return None
        of_device.synchronize(device)
        before = of_device.memory_allocated(device)
        of_device.reset_peak_memory_stats(device)
        job.run(argument)
        of_device.synchronize(device)
        peak: int = of_device.max_memory_allocated(device) - before
        return peak
    from torch.autograd.profiler import MEMORY_EVENT_NAME, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler would write to stderr
    with profile(profile_memory=True) as recorded:
        job.run(argument)
    assert recorded.kineto_results is not None
    now = peak = 0
    events = [e for e in recorded.kineto_results.events() if e.name() == MEMORY_EVENT_NAME]
    for event in sorted(events, key=lambda e: int(e.start_ns())):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def peak_resident(job: Job) -> int | None:
    """The bytes by which the process grows at most during one call of `job.run`; None where the system is not Linux.

    The pages of a memory-mapped file count once they are read.
    """
    argument = job.setup() if job.setup else None
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps freed memory: the call would use that, and the process would not grow
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets VmHWM, the peak
        before = _status("VmRSS")
        result = job.run(argument)
        peak = _status("VmHWM") - before
    except (OSError, KeyError):
        return None
    del result
    return max(peak, 0)


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        values = dict(line.split(":", 1) for line in file)
    return int(values[key].split()[0]) * 1024
