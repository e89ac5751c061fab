"""An interrupt at each line: a call is stopped at one line of se_inject, and then the model and the process are looked at."""

from __future__ import annotations

import builtins
import copy
import dataclasses
import logging
import os
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import se_inject
from se_inject.private import fx_is_tracing
from se_inject.undo import surgery_lock

FOLDER = os.path.dirname(se_inject.__file__)
Action = Callable[..., object]  # of a model
Point = tuple[str, int, int]  # a file, a line, and which of its executions


class _Lines:
    """Counts executed lines of se_inject, and raises at a point."""

    def __init__(self, at: Point | None = None, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.seen: Counter[tuple[str, int]] = Counter()
        self.at, self.error, self.raised = at, error, False

    def _enter(self, frame: Any, event: str, arg: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(FOLDER) else None

    def _line(self, frame: Any, event: str, arg: Any) -> Any:
        if event == "line" and not self.raised:
            where = frame.f_code.co_filename, frame.f_lineno
            self.seen[where] += 1
            if self.at is not None and where == self.at[:2] and self.seen[where] == self.at[2]:
                self.raised = True
                raise self.error("at a line")
        return self._line

    def run(self, action: Action, model: nn.Module) -> BaseException | None:
        """Call `action` on a model; returns the error that was raised."""
        was = sys.gettrace()
        sys.settrace(self._enter)
        try:
            action(model)
        except BaseException as error:
            sys.settrace(was)
            return error
        finally:
            sys.settrace(was)
        return None


def points(action: Action, model: nn.Module, within: str = "") -> list[Point]:
    """Each line that `action` executes on a copy of `model`, at its first and at its last execution, in files of this name."""
    lines = _Lines()
    error = lines.run(action, copy.deepcopy(model))
    assert error is None, error
    found = [(*where, n) for where, count in lines.seen.items() for n in dict.fromkeys((1, count))]
    return [point for point in found if point[0].endswith(within)]


def interrupted_call(action: Action, point: Point) -> BaseException | None:
    """Stop a call that needs no model at a point; returns the error."""
    return _Lines(point).run(action, nn.Identity())


def _described(model: nn.Module) -> list[Any]:
    """All but the values: classes, names, flags, hooks, devices."""
    return [
        (path, m.training, [t is None or (t.device, t.requires_grad, type(t)) for d in (m._parameters, m._buffers)
                            for t in d.values()],
         sorted((k, len(v) if isinstance(v, (dict, list)) else type(v)) for k, v in m.__dict__.items()),
         [*m._modules], m.code if isinstance(m, torch.fx.GraphModule) else type(m))
        for path, m in model.named_modules()]


def _values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: t for k, t in model.state_dict().items() if ".se" not in k}


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return [*a] == [*b] and all(map(torch.equal, a.values(), b.values()))


@dataclasses.dataclass
class State:
    """What a model is: its description, its base's values, and its outputs."""

    description: list[Any]
    values: dict[str, torch.Tensor]
    output: torch.Tensor

    @classmethod
    def of(cls, model: nn.Module, x: torch.Tensor) -> State:
        description, values = _described(model), {k: t.clone() for k, t in _values(model).items()}
        modes = [(m, m.training) for m in model.modules()]
        type(model).train(model, False)
        with torch.no_grad():
            output = model(x)
        for m, training in modes:
            m.training = training
        return cls(description, values, output)

    def is_of(self, model: nn.Module, x: torch.Tensor) -> bool:
        if self.description != _described(model) or not _same(self.values, _values(model)):
            return False
        return torch.equal(self.output, State.of(model, x).output)


def process_state() -> list[Any]:
    """What all threads share, and the modes of this one."""
    free: list[bool] = []

    def take() -> None:
        free.append(surgery_lock.acquire(blocking=False))
        if free[0]:
            surgery_lock.release()

    other = threading.Thread(target=take)
    other.start()
    other.join()
    return [
        free, [getattr(nn.Module, name) for name in ("__call__", "__getattr__", "__setattr__")], builtins.print,
        logging.Logger.handle, torch.is_inference_mode_enabled, torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
        [(torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")],
        len(_get_current_dispatch_mode_stack()), len(_get_current_function_mode_stack()), torch.get_default_dtype(),
        fx_is_tracing(), random.getstate(),
        {(name, k): v for name in _PATCHED for k, v in vars(sys.modules[name]).items() if callable(v)}]


_PATCHED = ("math", "torch.nn.functional", "timm.models.resnet", "timm.models.vision_transformer")


@dataclasses.dataclass
class Case:
    """An action on a model, its input, and what the model is before and after.

    An action is stopped by `sys.settrace`: at each line there is one event, also at the way out of a `with`.
    """

    make: Callable[[], nn.Module]
    action: Action
    x: torch.Tensor

    def __post_init__(self) -> None:
        self.model = self.make()
        self.before = State.of(self.model, self.x)
        whole = copy.deepcopy(self.model)
        self.action(whole)
        self.after = State.of(whole, self.x)
        self.points = points(self.action, self.model)

    def stopped_at(self, point: Point, error: type[BaseException] = KeyboardInterrupt) -> str | None:
        """Stop the action at a point; returns what is half done, or None where nothing is."""
        model = copy.deepcopy(self.model)
        shared, drawn = process_state(), torch.get_rng_state()
        raised = _Lines(point, error).run(self.action, model)  # held, as a console holds the last error
        if (now := process_state()) != shared:
            return f"shared: {[a for a, b in zip(now, shared) if a != b]}"
        if self.after.is_of(model, self.x):
            return None
        if raised is None:
            return "something else is done, without an error"
        if self.before.is_of(model, self.x):
            return None if torch.equal(torch.get_rng_state(), drawn) else "random numbers are drawn"
        try:
            self.action(model)
        except Exception as again:
            return f"half done, and a second call raises {again!r}"
        return None if self.after.is_of(model, self.x) else "half done, also after a second call"
