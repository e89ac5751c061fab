"""A call that is interrupted at any line leaves the model as it was, or does all, or a second call does all."""

from __future__ import annotations

import functools

import pytest
import timm
import torch
from torch import fx, nn

import se_inject
from se_inject.timm_tables import TwinEntrypoints

from ..support.interrupts import Action, Case, interrupted_call, points, process_state
from ..support.residual import Network, Unit
from ..support.tiers import contract


class Filled(Unit):
    def __init__(self, slot: nn.Module | None):
        super().__init__()
        self.se, self.skip = slot, True

    def forward(self, x):
        y = self.b(self.a(x))
        if self.se is not None:
            y = self.se(y)
        return x + y if self.skip else y


class Plain(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU())


def toy() -> nn.Module:
    """An owner of each kind: with a generated class, with a slot of both kinds, a GraphModule, a Sequential."""
    model = Network(Unit(), Filled(None), Filled(nn.Identity()), fx.symbolic_trace(Unit()))
    model.stem = Plain()
    model.units[0].a.eval()
    model.head.bias.requires_grad_(False)
    model.get_classifier = lambda: model.head
    return model


MODELS = {
    "toy": (toy, (3, 16, 16)), "test_resnet": (lambda: timm.create_model("test_resnet"), (3, 64, 64)),
    "test_vit": (lambda: timm.create_model("test_vit"), (3, 160, 160))}


def inject(model: nn.Module, size: tuple[int, ...]) -> nn.Module:
    return se_inject.inject(model, input_size=size)


def set_and_plan(model: nn.Module, size: tuple[int, ...]) -> None:
    """Make an owner stale, and let it be regenerated."""
    model.units[0].note = 2
    se_inject.plan(model, input_size=size)


ACTIONS: dict[str, tuple[bool, Action]] = {  # whether it begins with a frozen model, and what it does
    "eject": (False, lambda m, size: se_inject.eject(m)),
    "eject frozen": (True, lambda m, size: se_inject.eject(m)),
    "freeze": (False, lambda m, size: se_inject.freeze_base(m, head=m.fc if hasattr(m, "fc") else m.head)),
    "freeze again": (True, lambda m, size: se_inject.freeze_base(m, head=False)),
    "unfreeze": (True, lambda m, size: se_inject.unfreeze_base(m)),
    "train": (True, lambda m, size: m.train()),
    "stale": (False, set_and_plan),
    "fold": (False, lambda m, size: se_inject.fold(m, [torch.ones(2, *size)])),
    "optimize": (False, lambda m, size: se_inject.optimize_for_inference(m, input_size=size)),
}  # fmt: skip


def case(model: str, action: str) -> Case:
    make, size = MODELS[model]
    if action in ("plan", "inject"):
        return Case(make, functools.partial(inject if action == "inject" else se_inject.plan, **(
            {"size": size} if action == "inject" else {"input_size": size})), torch.randn(2, *size))
    frozen, function = ACTIONS[action]

    def injected() -> nn.Module:
        made = inject(make(), size)
        return se_inject.freeze_base(made, head=False) if frozen else made

    return Case(injected, functools.partial(function, size=size), torch.randn(2, *size))


SHORT = ("eject", "eject frozen", "freeze", "freeze again", "unfreeze")


@pytest.mark.parametrize("model, action, stride", [
    *(("toy", action, 29) for action in (*SHORT, "train")), ("toy", "inject", 331), ("toy", "fold", 701),
    *contract(
        *((model, action, 1 if model == "toy" else 3) for model in MODELS for action in SHORT),
        ("toy", "inject", 23), ("toy", "fold", 61), ("toy", "plan", 61), ("toy", "stale", 61), ("toy", "optimize", 127),
        ("test_resnet", "inject", 61), ("test_vit", "inject", 83), ("test_vit", "fold", 127)),
])  # fmt: skip
def test_nothing_is_half_done(model, action, stride):
    """Each n-th line, by each of two errors, of which the second begins between: a stride of 2 is one of them at each line."""
    tried = case(model, action)
    for error, first in ((KeyboardInterrupt, 0), (MemoryError, stride // 2)):
        found = {point: what for point in tried.points[first::stride] if (what := tried.stopped_at(point, error))}
        assert not found, error


@pytest.mark.contract
@pytest.mark.parametrize("registered", [False, True])
def test_the_door_of_timm(registered):
    """An interrupted `create_model` leaves no injection that waits for the next model, and no name without its twin."""
    import timm.models._registry as registry

    def door(_: object = None) -> nn.Module:
        if registered:
            registry._model_entrypoints["test_resnet"] = registry._model_entrypoints["test_resnet"]
        return timm.create_model("se_inject/test_resnet")

    for point in points(door, nn.Identity(), "timm_registry.py"):
        shared = process_state()
        interrupted_call(door, point)
        assert process_state() == shared
        assert not se_inject.block_paths(timm.create_model("test_resnet")), point
        assert len(se_inject.block_paths(door())) == 4, point
        assert isinstance(registry._model_entrypoints, TwinEntrypoints)
