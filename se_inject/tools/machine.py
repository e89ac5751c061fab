"""The machine of a benchmark: its device, its threads, and how a report names it."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import torch

from ..errors import ConfigError

# other measures take every device that computes
_FITTING = {"surgery": ("cpu", "meta"), "loading": ("cpu",), "startup": ("cpu",)}


def device_for(name: str, measure: str) -> torch.device:
    """The named device.

    Raises:
        ConfigError: torch has no such device here, or it does not fit `measure`.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        cause = str(error).partition("\n")[0]
        raise ConfigError(f"--device {name}: torch has no such device here ({cause}): write --device cpu") from error
    fitting = _FITTING.get(measure)
    if device.type == "meta" if fitting is None else device.type not in fitting:
        needed = "a device that computes, such as cpu" if fitting is None else " or ".join(fitting)
        raise ConfigError(f"--device {name}: --measure {measure} needs {needed}")
    return device


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Inside, torch computes with `count` threads; None leaves their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def description(device: torch.device) -> dict[str, Any]:
    """The device's name, the number of threads, and the versions, as JSON types."""
    import timm

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {"device": name, "threads": torch.get_num_threads(), "python": platform.python_version(),
            "torch": torch.__version__, "timm": timm.__version__, "se_inject": version("se-inject")}  # fmt: skip


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
