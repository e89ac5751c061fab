"""What blocks cost: inference, a training step, the injection itself, and loading; against the base in the same run."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import SEConfig
from ..errors import ConfigError
from ..surgery import pipeline as surgery
from ..surgery.session import traced
from ..timm_names import PREFIX, base_name, door_options, skeleton
from .timing import Job, Spread, clock, interleaved, peak_memory, peak_resident, ratios, watched
from .variants import BASE, OPTIMIZED, Variant, create, image_size, optimized, outputs, plain_variants

MEASURES = ("inference", "training", "surgery", "loading")
DTYPES = ("float32", "bfloat16", "float16")
CHECKED = 2  # images on which an optimised model is compared with the plain one
PARTS = {"traced": "record", "find_sites": "sites", "_jobs": "code", "apply": "apply"}  # of an injection, by their functions


@dataclasses.dataclass(frozen=True)
class Settings:
    """How it is measured; see the options of ``se-inject bench``."""

    batches: tuple[int, ...] = (1,)
    dtypes: tuple[str, ...] = ("float32",)
    size: int | None = None
    threads: int | None = None
    device: str = "cpu"
    channels_last: bool = False
    compile: bool = False
    native: bool = True
    rounds: int | None = None
    min_time: float = 3.0


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of a comparison.

    Attributes:
        name, architecture: See `Variant`; of surgery and loading, `name` is what was done.
        seconds: Of one call.
        ratios: To the lines that it is compared with, from the times of the same round.
        memory: Bytes at the peak, beyond what was there before.
        params, blocks, deviation: See `Variant`.
        parts: Seconds (medians) of the parts of an injection.
        nodes: Nodes of the graphs that an injection traced; a module that is there many times counts as often.
        file: Bytes of the file that was loaded.
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
    """What was timed in the same rounds."""

    model: str
    rounds: int
    entries: tuple[Entry, ...]
    batch: int | None = None
    size: tuple[int, ...] | None = None
    dtype: str | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """All comparisons of one run, and where it was."""

    measure: str
    settings: Settings
    options: dict[str, Any]
    machine: dict[str, Any]
    comparisons: tuple[Comparison, ...]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def bench(
    names: Sequence[str], measure: str = "inference", config: SEConfig | None = None, args: Mapping[str, Any] | None = None,
    others: Sequence[tuple[str, Mapping[str, Any]]] = (), settings: Settings | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> Report:  # fmt: skip
    """Measure each of `names`.

    Args:
        names: timm names of bases.
        measure: One of `MEASURES`.
        config: The injection's options.
        args: Arguments of `timm.create_model`, for the bases.
        others: Names and arguments of further models, for inference and training.
        settings: How.
        say: Is told what is done.

    Raises:
        ConfigError: A name, the device or the size is not there, or does not go with `measure`.
        SEInjectError: There is nothing to inject, or an optimised model does not compute what the plain one does.
    """
    settings, config, args = settings or Settings(), config or SEConfig(), dict(args or {})
    device = _device(settings.device, measure)
    if others and measure in ("surgery", "loading"):
        raise ConfigError(f"--measure {measure} is of the names themselves, and takes no --vs: give all names as NAME...")
    names = [base_name(name) for name in names]
    for name in names:
        image_size(name, args, settings.size)  # a wrong name is said before anything is timed
    for name, given in others:
        image_size(name, given, settings.size)
    measures: dict[str, Callable[..., Iterator[Comparison]]] = {
        "inference": _inference, "training": _training, "surgery": _surgery, "loading": _loading}
    with _threads(settings.threads), torch.random.fork_rng(devices=[]), _silent():
        torch.manual_seed(0)
        comparisons = [c for name in names for c in measures[measure](name, config, args, others, settings, device, say)]
        machine = _machine(device)
    return Report(measure, settings, {**config.to_dict(), **args}, machine, tuple(comparisons))


def _inference(
    name: str, config: SEConfig, args: dict[str, Any], others: Any, settings: Settings, device: torch.device, say: Any
) -> Iterator[Comparison]:
    say(f"{name}: making the models")
    plain = plain_variants(name, config, args, others, settings.native)
    size = image_size(name, args, settings.size)
    layout = _layout(settings)
    variants: list[Variant] = []
    for v in plain:
        v.model.to(device).to(memory_format=layout)
        variants += [v, optimized(v, _images(CHECKED, size, device, layout))]
    for dtype in settings.dtypes:
        kind = getattr(torch, dtype)
        models = {v.name: v.model.to(kind) for v in variants}
        if settings.compile:
            torch.compiler.reset()
            models = {key: torch.compile(model) for key, model in models.items()}  # type: ignore[misc]
        for batch in settings.batches:
            images = _images(batch, size, device, layout).to(kind)
            jobs = {key: Job(functools.partial(_forward, model, images)) for key, model in models.items()}
            yield _compared(name, variants, jobs, settings, device, say, batch=batch, size=size, dtype=dtype)


def _training(
    name: str, config: SEConfig, args: dict[str, Any], others: Any, settings: Settings, device: torch.device, say: Any
) -> Iterator[Comparison]:
    say(f"{name}: making the models")
    variants = plain_variants(name, config, args, others, settings.native)
    size = image_size(name, args, settings.size)
    layout = _layout(settings)
    models = {v.name: v.model.to(device).to(memory_format=layout).train() for v in variants}
    if settings.compile:
        torch.compiler.reset()
        models = {key: torch.compile(model) for key, model in models.items()}  # type: ignore[misc]
    for dtype in settings.dtypes:
        for batch in settings.batches:
            images = _images(batch, size, device, layout)
            jobs = {
                v.name: Job(functools.partial(_step, models[v.name], images, dtype), functools.partial(_forget, v.model))
                for v in variants}
            yield _compared(name, variants, jobs, settings, device, say, batch=batch, size=size, dtype=dtype)


def _compared(
    name: str, variants: list[Variant], jobs: dict[str, Job], settings: Settings, device: torch.device, say: Any,
    **said: Any,
) -> Comparison:  # fmt: skip
    """Time the variants, those that are optimised also against the optimised base."""
    times = _timed(f"{name}, batch {said['batch']}, {said['dtype']}", jobs, settings, device, say)
    entries = []
    for v in variants:
        against = [BASE, BASE + OPTIMIZED] if v.optimised else [BASE]
        entries.append(Entry(
            v.name, v.architecture, Spread.of(times[v.name]), {to: ratios(times, v.name, to) for to in against},
            peak_memory(jobs[v.name], device), v.params, v.blocks, v.deviation))
    return Comparison(name, len(times[BASE]), tuple(entries), **said)


def _surgery(
    name: str, config: SEConfig, args: dict[str, Any], others: Any, settings: Settings, device: torch.device, say: Any
) -> Iterator[Comparison]:
    """`inject` on a new model each time, against the making of the model."""
    import timm

    def new(_: object = None) -> nn.Module:
        if device.type == "meta":
            return skeleton(name, **args)
        model: nn.Module = timm.create_model(name, **args)
        return model

    jobs = {"create_model": Job(new), "inject": Job(lambda model: surgery.inject(model, config), new)}
    with watched(surgery, list(PARTS)) as seconds:
        times = _timed(name, jobs, settings, device, say)
        parts = {part: Spread.of(seconds[function][-len(times["inject"]):]).median for function, part in PARTS.items()}
    model = new()
    params = sum(p.numel() for p in model.parameters())
    nodes = _nodes(model)
    del model
    memory = None if device.type == "meta" else peak_resident(jobs["inject"])
    plan = surgery.plan(new(), config)
    yield Comparison(name, len(times["inject"]), (
        Entry("create_model", name, Spread.of(times["create_model"]), {}, params=params),
        Entry("inject", f"se_inject/{name}", Spread.of(times["inject"]),
              {"create_model": ratios(times, "inject", "create_model")}, memory, plan.added_params, len(plan.sites),
              parts=parts, nodes=nodes)))  # fmt: skip


def _nodes(model: nn.Module) -> int:
    with traced(model) as traces:
        views = [traces.view(module) for module in traces.calls]
        return sum(len(view.nodes) for view in views if view is not None)


def _loading(
    name: str, config: SEConfig, args: dict[str, Any], others: Any, settings: Settings, device: torch.device, say: Any
) -> Iterator[Comparison]:
    """Files into models that are there, against `load_file` and `load_state_dict`; and into new ones, against timm's door."""
    import timm
    from safetensors.torch import load_file, save_file
    from timm.models import load_checkpoint

    from ..weights.files import load, save

    base, twin = create(name, args), PREFIX + name
    injected = surgery.inject(create(name, args), config)
    said = door_options([config])
    with tempfile.TemporaryDirectory() as folder:
        plain, full = (str(Path(folder) / f"{file}.safetensors") for file in ("base", "injected"))
        save_file(base.state_dict(), plain)
        save(injected, full)
        into, made = "load_file, load_state_dict", "create_model(checkpoint_path)"
        work: dict[str, tuple[str, str, str, Callable[[], object]]] = {  # architecture, file, compared with, call
            into: (name, plain, into, lambda: base.load_state_dict(load_file(plain))),
            "load(model=)": (twin, full, into, lambda: load(full, model=injected)),
            "load(model=), the base's file": (twin, plain, into, lambda: load(plain, model=injected)),
            "load_checkpoint": (twin, full, into, lambda: load_checkpoint(injected, full)),
            made: (name, plain, made, lambda: timm.create_model(name, checkpoint_path=plain, **args)),
            "load(path)": (twin, full, made, lambda: load(full)),
            f"{made}, twin": (twin, full, made, lambda: timm.create_model(twin, checkpoint_path=full, **args, **said)),
        }  # fmt: skip
        jobs = {key: Job(lambda _, call=call: call()) for key, (*_, call) in work.items()}  # type: ignore[misc]
        times = _timed(name, jobs, settings, device, say)
        entries = [
            Entry(key, architecture, Spread.of(times[key]), {to: ratios(times, key, to)}, peak_resident(jobs[key]),
                  file=Path(file).stat().st_size)
            for key, (architecture, file, to, _) in work.items()]
    yield Comparison(name, len(times[into]), tuple(entries))


def _timed(
    what: str, jobs: Mapping[str, Job], settings: Settings, device: torch.device, say: Callable[[str], object]
) -> dict[str, list[float]]:
    say(f"{what}: timing {', '.join(jobs)}")
    return interleaved(jobs, rounds=settings.rounds, min_time=settings.min_time, now=clock(device))


@torch.inference_mode()
def _forward(model: nn.Module, images: torch.Tensor, _: object) -> object:
    return model(images)


def _step(model: nn.Module, images: torch.Tensor, dtype: str, _: object) -> None:
    """Forward, loss and backward; the loss is the mean square of the outputs."""
    with torch.autocast(images.device.type, getattr(torch, dtype), enabled=dtype != "float32"):
        y = outputs(model(images))
    loss = torch.stack([t.float().square().mean() for t in y]).sum()
    loss.backward()


def _forget(model: nn.Module) -> None:
    model.zero_grad(set_to_none=True)


def _images(batch: int, size: tuple[int, ...], device: torch.device, layout: torch.memory_format) -> torch.Tensor:
    images = torch.randn(batch, *size, generator=torch.Generator().manual_seed(0))
    return images.to(device=device, memory_format=layout)


def _layout(settings: Settings) -> torch.memory_format:
    return torch.channels_last if settings.channels_last else torch.preserve_format


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Inside, what is injected and loaded again and again is not told each time."""
    logger = logging.getLogger("se_inject")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


def _device(name: str, measure: str) -> torch.device:
    """The device, if it is there.

    Raises:
        ConfigError: It is not, or `measure` is not for it.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        said = str(error).partition("\n")[0]
        raise ConfigError(f"--device {name}: torch has no such device here ({said}): write --device cpu") from error
    fitting = {"surgery": ("cpu", "meta"), "loading": ("cpu",)}.get(measure)
    if device.type not in fitting if fitting else device.type == "meta":
        other = "a device that computes" if fitting is None else " or ".join(fitting)
        raise ConfigError(f"--device {name}: --measure {measure} is done on {other}")
    return device


def _machine(device: torch.device) -> dict[str, Any]:
    from importlib.metadata import version

    import timm

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {"device": name, "threads": torch.get_num_threads(), "python": platform.python_version(),
            "torch": torch.__version__, "timm": timm.__version__, "se_inject": version("se-inject")}  # fmt: skip


def _processor() -> str:
    """The processor's name as the system says it."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
