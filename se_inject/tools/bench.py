"""What blocks cost: in inference and in training, to inject, to load, and to start a process; each is timed beside a base."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..capture.values import tensors
from ..config import SEConfig
from ..errors import ConfigError, SEInjectError
from ..find.plan import Plan
from ..private import compiling_up_to
from ..surgery import pipeline
from ..surgery.jobs import owner_jobs
from ..timm_names import PREFIX, base_name, door_options, skeleton
from ..weights.files import load, save
from .bench_report import STAGES, Comparison, Entry, Report, Settings
from .engines import Program, program
from .machine import description, device_for, threads
from .memory import peak_memory, peak_resident
from .outputs import deviation, run
from .timing import Job, Spread, clock, interleaved, ratios
from .variants import BASE, OPTIMIZED, Variant, create, image_size, optimized, plain_variants

ENGINE_TOLERANCE = 1e-4  # the largest deviation of an engine from torch, in float32
CHECKED = 2  # images on which an optimized model is compared with the plain one

Other = tuple[str, Mapping[str, Any]]  # a timm name and its arguments


def bench(
    names: Sequence[str], measure: str = "inference", config: SEConfig | None = None, args: Mapping[str, Any] | None = None,
    others: Sequence[Other] = (), settings: Settings | None = None, say: Callable[[str], object] = lambda text: None,
) -> Report:  # fmt: skip
    """Measure each base in `names`.

    Args:
        names: timm names.
        measure: One of `MEASURES`.
        config: The options of the injection.
        args: Arguments of `timm.create_model`, for the bases.
        others: Further models, for inference and training.
        settings: How to measure.
        say: Called with a line of text before each step.

    Raises:
        ConfigError: A name, the device or the size does not exist, or does not fit `measure`.
        SEInjectError: There is nothing to inject, or an optimized model deviates from the plain one.
    """
    config, args, settings = config or SEConfig(), dict(args or {}), settings or Settings()
    device = device_for(settings.device, measure)
    _check_backend(settings)
    _check_engine(measure, settings, device)
    if measure not in ("inference", "training"):
        _check_no_calls(measure, settings, others)
    if measure == "startup" and (args or config != SEConfig()):
        raise ConfigError("--measure startup takes no options of models or blocks: give NAMEs alone")
    if not settings.batches:
        settings = dataclasses.replace(settings, batches=(8 if measure == "training" else 1,))
    tasks = [
        _Task(name, config, args, others, settings, device, say, image_size(name, args, settings.size))
        for name in map(base_name, names)]
    for other, other_args in others:
        image_size(other, other_args, settings.size)  # a wrong name is an error before anything is timed
    compiling = compiling_up_to(256) if settings.compile else contextlib.nullcontext()
    with threads(settings.threads), torch.random.fork_rng(devices=[]), _quiet(), compiling:
        torch.manual_seed(0)
        comparisons = tuple(comparison for task in tasks for comparison in MEASURES[measure](task))
        machine = description(device)
    return Report(measure, settings, {**config.to_dict(), **args}, machine, comparisons)


@dataclasses.dataclass(frozen=True)
class _Task:
    """One base, and how to measure it."""

    name: str
    config: SEConfig
    args: Mapping[str, Any]
    others: Sequence[Other]
    settings: Settings
    device: torch.device
    say: Callable[[str], object]
    size: tuple[int, ...]

    @property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.settings.channels_last else torch.preserve_format

    def variants(self) -> list[Variant]:
        self.say(f"{self.name}: making the models")
        variants = plain_variants(self.name, self.config, self.args, self.others, self.settings.native)
        for v in variants:
            v.model.to(self.device).to(memory_format=self.layout)
        return variants

    def images(self, batch: int) -> torch.Tensor:
        images = torch.randn(batch, *self.size, generator=torch.Generator().manual_seed(0))
        return images.to(device=self.device, memory_format=self.layout)

    def compiled(self, models: dict[str, nn.Module]) -> Mapping[str, Program]:
        if not self.settings.compile:
            return models
        torch.compiler.reset()
        return {  # type: ignore[misc]
            name: torch.compile(model, backend=self.settings.backend, dynamic=False) for name, model in models.items()}

    def programs(self, variants: list[Variant], images: torch.Tensor) -> dict[str, Program]:
        """The variants as programs of the engine, each compared with its model in torch.

        Raises:
            SEInjectError: One deviates.
        """
        found = {}
        for v in variants:
            self.say(f"{self.name}: writing {v.name} for {self.settings.engine}")
            found[v.name] = program(v.model, images, self.settings.engine)
            if not (off := deviation(tensors(run(v.model, images)), found[v.name](images))) <= ENGINE_TOLERANCE:
                raise SEInjectError(
                    f"{v.architecture} ({v.name}): the outputs of {self.settings.engine} deviate from torch's by {off:.1e} of "
                    f"the largest output, more than {ENGINE_TOLERANCE:g}; nothing was timed")
        return found

    def timed(self, jobs: Mapping[str, Job], what: str = "") -> dict[str, list[float]]:
        self.say(f"{self.name}{what}: timing {', '.join(jobs)}")
        return interleaved(jobs, rounds=self.settings.rounds, min_time=self.settings.min_time, now=clock(self.device))

    def compared(self, variants: list[Variant], jobs: dict[str, Job], batch: int, dtype: str) -> Comparison:
        """Time the variants against the base, and the optimized ones also against the optimized base."""
        times = self.timed(jobs, f", batch {batch}, {dtype}")
        entries = []

        def memory(job: Job) -> int | None:  # an engine does not use torch's allocator
            return peak_memory(job, self.device) if self.settings.engine == "torch" else None

        for v in variants:
            references = [BASE, BASE + OPTIMIZED] if v.is_optimized else [BASE]
            entries.append(Entry(
                v.name, v.architecture, Spread.of(times[v.name]), {to: ratios(times, v.name, to) for to in references},
                memory(jobs[v.name]), v.params, v.blocks, v.deviation if dtype == "float32" else None))
        return Comparison(self.name, len(times[BASE]), tuple(entries), batch, self.size, dtype)


def _inference(task: _Task) -> Iterator[Comparison]:
    images = task.images(CHECKED)
    variants = [v for plain in task.variants() for v in (plain, optimized(plain, images))]
    for dtype in task.settings.dtypes:
        kind = getattr(torch, dtype)
        models = task.compiled({v.name: v.model.to(kind) for v in variants})
        for batch in task.settings.batches:
            images = task.images(batch).to(kind)
            if task.settings.engine != "torch":
                models = task.programs(variants, images)
            jobs = {name: Job(functools.partial(_forward, model, images)) for name, model in models.items()}
            yield task.compared(variants, jobs, batch, dtype)


def _training(task: _Task) -> Iterator[Comparison]:
    variants = task.variants()
    models = task.compiled({v.name: v.model.train() for v in variants})
    for dtype in task.settings.dtypes:
        for batch in task.settings.batches:
            images = task.images(batch)
            jobs = {
                v.name: Job(functools.partial(_step, models[v.name], images, dtype), v.model.zero_grad)
                for v in variants}
            yield task.compared(variants, jobs, batch, dtype)


def _surgery(task: _Task) -> Iterator[Comparison]:
    """The injection of a new model, against the creation of the model."""
    import timm

    def new(_: object = None) -> nn.Module:
        if task.device.type == "meta":
            return skeleton(task.name, **task.args)
        model: nn.Module = timm.create_model(task.name, **task.args)
        return model

    seconds: dict[str, list[float]] = {stage: [] for stage in STAGES}
    jobs = {"create_model": Job(new), "inject": Job(lambda model: inject_in_stages(model, task.config, seconds), new)}
    times = task.timed(jobs)
    rounds = len(times["inject"])
    parts = {stage: Spread.of(values[-rounds:]).median for stage, values in seconds.items()}  # without the warm-up calls
    memory = None if task.device.type == "meta" else peak_resident(jobs["inject"])
    model = new()
    plan = pipeline.plan(model, task.config)
    yield Comparison(task.name, rounds, (
        Entry("create_model", task.name, Spread.of(times["create_model"]), {}, params=plan.params),
        Entry("inject", f"se_inject/{task.name}", Spread.of(times["inject"]),
              {"create_model": ratios(times, "inject", "create_model")}, memory, plan.added_params, len(plan.sites),
              parts=parts, nodes=_nodes(model, task.config))))  # fmt: skip


def inject_in_stages(model: nn.Module, config: SEConfig, seconds: Mapping[str, list[float]]) -> nn.Module:
    """`inject`, stage by stage: appends the seconds of each of `STAGES` to its list in `seconds`."""
    start = time.perf_counter()

    def finished(stage: str) -> None:
        nonlocal start
        now = time.perf_counter()
        seconds[stage].append(now - start)
        start = now

    with pipeline.recorded(model, config) as traces:
        finished("record")
        found, _ = pipeline.placed_sites(model, traces, config)
        finished("sites")
        jobs = owner_jobs(found, traces)
        finished("code")
    sites = tuple(s.site for s in found)
    plan = Plan(type(model).__name__, config, traces.run.input_size, 0, traces.run.macs, sites)
    pipeline.apply(model, pipeline.Prepared(plan, tuple(jobs)))
    finished("apply")
    return model


def _nodes(model: nn.Module, config: SEConfig) -> int:
    with pipeline.recorded(model, config) as traces:
        views = [traces.view(module) for module in traces.calls]
        return sum(len(view.nodes) for view in views if view is not None)


def _loading(task: _Task) -> Iterator[Comparison]:
    """Into a model that exists, against `load_file` and `load_state_dict`; into a new model, against `checkpoint_path`."""
    import timm
    from safetensors.torch import load_file, save_file
    from timm.models import load_checkpoint

    base, name, twin, args = create(task.name, task.args), task.name, PREFIX + task.name, task.args
    injected = pipeline.inject(create(name, args), task.config)
    twin_args = {**args, **door_options([task.config])}
    with tempfile.TemporaryDirectory() as folder:
        plain, full = (str(Path(folder) / f"{file}.safetensors") for file in ("base", "injected"))
        save_file(base.state_dict(), plain)
        save(injected, full)
        into, created = "load_file, load_state_dict", "create_model(checkpoint_path)"
        work: dict[str, tuple[str, str, str, Callable[[], object]]] = {  # architecture, file, compared with, call
            into: (name, plain, into, lambda: base.load_state_dict(load_file(plain))),
            "load(model=)": (twin, full, into, lambda: load(full, model=injected)),
            "load(model=), the base's file": (twin, plain, into, lambda: load(plain, model=injected)),
            "load_checkpoint": (twin, full, into, lambda: load_checkpoint(injected, full)),
            created: (name, plain, created, lambda: timm.create_model(name, checkpoint_path=plain, **args)),
            "load(path)": (twin, full, created, lambda: load(full)),
            f"{created}, twin": (twin, full, created, lambda: timm.create_model(twin, checkpoint_path=full, **twin_args)),
        }  # fmt: skip
        jobs = {key: Job(lambda _, call=call: call()) for key, (*_, call) in work.items()}  # type: ignore[misc]
        times = task.timed(jobs)
        entries = [
            Entry(key, architecture, Spread.of(times[key]), {to: ratios(times, key, to)}, peak_resident(jobs[key]),
                  file=Path(file).stat().st_size)
            for key, (architecture, file, to, _) in work.items()]
    yield Comparison(name, len(times[into]), tuple(entries))


def _startup(task: _Task) -> Iterator[Comparison]:
    """New processes, until they have imported timm, made a model, or printed a plan.

    Raises:
        SEInjectError: One fails.
    """
    imported, created = "import timm", "create_model"
    make = "timm.create_model({!r})".format
    work = {  # compared with, what Python runs
        imported: (imported, ("-c", "import timm")),
        "import se_inject, timm": (imported, ("-c", "import se_inject, timm")),
        created: (created, ("-c", f"import timm; {make(task.name)}")),
        f"{created}, twin": (created, ("-c", f"import se_inject, timm; {make(PREFIX + task.name)}")),
        "se-inject plan": (created, ("-m", "se_inject", "plan", task.name)),
    }

    def process(words: Sequence[str], _: object) -> str:
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment)
        if done.returncode:
            said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
            raise SEInjectError(f"python {shlex.join(words)} failed: {said}")
        return done.stdout

    jobs = {key: Job(functools.partial(process, words)) for key, (_, words) in work.items()}
    times = task.timed(jobs)
    entries = [Entry(key, task.name, Spread.of(times[key]), {to: ratios(times, key, to)}) for key, (to, _) in work.items()]
    yield Comparison(task.name, len(times[imported]), tuple(entries))


def _check_backend(settings: Settings) -> None:
    """
    Raises:
        ConfigError: torch.compile has no such backend, or is not asked for.
    """
    if settings.backend == Settings.backend:
        return
    if not settings.compile:
        raise ConfigError(f"--backend {settings.backend} is of torch.compile: give --compile, too")
    backends = torch.compiler.list_backends(exclude_tags=())
    if settings.backend not in backends:
        raise ConfigError(f"--backend {settings.backend}: torch.compile has {', '.join(backends)}")


def _check_no_calls(measure: str, settings: Settings, others: Sequence[Other]) -> None:
    """
    Raises:
        ConfigError: There are options of calls of models, and `measure` calls none.
    """
    of_calls = {"--vs": others, "--batch": settings.batches, "--size": settings.size, "--compile": settings.compile,
                "--dtype": settings.dtypes != Settings.dtypes, "--channels-last": settings.channels_last,
                "--no-native": not settings.native}
    if given := [option for option, value in of_calls.items() if value]:
        raise ConfigError(f"--measure {measure} calls no model: leave {' and '.join(given)} out; all models are NAMEs")


def _check_engine(measure: str, settings: Settings, device: torch.device) -> None:
    """
    Raises:
        ConfigError: The engine does not run what is to be measured.
    """
    if settings.engine == "torch":
        return
    asked = {"--measure": measure, "--dtype": " ".join(settings.dtypes), "--device": device.type, "--compile": settings.compile,
             "--channels-last": settings.channels_last}
    fits = {"--measure": "inference", "--dtype": "float32", "--device": "cpu", "--compile": False, "--channels-last": False}
    for option, value in fits.items():
        if asked[option] != value:
            given = option if value is False else f"{option} {asked[option]}"
            raise ConfigError(f"--engine {settings.engine} runs inference in float32 on the CPU, in the engine's own layout: "
                              f"leave {given} out")


MEASURES: dict[str, Callable[[_Task], Iterator[Comparison]]] = {
    "inference": _inference, "training": _training, "surgery": _surgery, "loading": _loading,
    "startup": _startup}  # fmt: skip


@torch.inference_mode()
def _forward(model: Program, images: torch.Tensor, _: object) -> object:
    return model(images)


def _step(model: Program, images: torch.Tensor, dtype: str, _: object) -> None:
    """Forward, loss and backward; the loss is the mean square of the outputs."""
    with torch.autocast(images.device.type, getattr(torch, dtype), enabled=dtype != "float32"):
        output = model(images)
    loss = torch.stack([t.float().square().mean() for t in tensors(output)]).sum()
    loss.backward()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside, injections and loads are not logged: they happen again in each round."""
    logger = logging.getLogger("se_inject")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)
