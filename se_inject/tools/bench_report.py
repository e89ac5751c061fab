"""What a benchmark found, as plain data."""

from __future__ import annotations

import dataclasses
from typing import Any

from .timing import Spread

STAGES = ("record", "sites", "code", "apply")  # of an injection


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to measure; see the options of ``se-inject bench``.

    Attributes:
        batches: Batch sizes; empty is 1, or 8 for training.
        size: Height and width of the images; None is the model's own.
        threads: None leaves torch's number.
        compile: Whether torch.compile compiles the models, for each batch size.
        backend: Of torch.compile.
        engine: What runs the models: torch, or an engine that `engines.program` knows.
        rounds: None is as many as `min_time` allows.
        min_time: Seconds for each job, on average.
    """

    batches: tuple[int, ...] = ()
    dtypes: tuple[str, ...] = ("float32",)
    size: int | None = None
    threads: int | None = None
    device: str = "cpu"
    channels_last: bool = False
    compile: bool = False
    backend: str = "inductor"
    engine: str = "torch"
    native: bool = True
    rounds: int | None = None
    min_time: float = 3.0


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of a comparison.

    Attributes:
        name: The variant's name (see `Variant`); for surgery, loading and startup, the job's name.
        architecture: The timm name.
        seconds: For one call.
        ratios: To other lines, by their names; from the times of the same round.
        memory: Bytes at the peak, beyond what was allocated before.
        params, blocks, deviation: See `Variant`. For the line ``inject``, the parameters of the blocks alone.
        parts: The median of the seconds in each stage of an injection.
        nodes: Nodes of the traced forwards; each module counts once, also where modules share a trace.
        file: Bytes of the file that is loaded.
    """

    name: str
    architecture: str
    seconds: Spread
    ratios: dict[str, Spread]
    memory: int | None = None
    params: int | None = None
    blocks: int | None = None
    deviation: float | None = None
    parts: dict[str, float] | None = None
    nodes: int | None = None
    file: int | None = None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The lines that were timed in the same rounds."""

    model: str
    rounds: int
    entries: tuple[Entry, ...]
    batch: int | None = None
    size: tuple[int, ...] | None = None
    dtype: str | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """All comparisons of one run, and the machine."""

    measure: str
    settings: Settings
    options: dict[str, Any]
    machine: dict[str, Any]
    comparisons: tuple[Comparison, ...]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
