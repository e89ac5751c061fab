"""The second part of the demonstration: the head alone, and SE blocks and head, trained on digits at equal steps."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..errors import SEInjectError
from ..surgery.freezing import freeze_base
from ..surgery.pipeline import inject
from ..tables import text_table

TRAIN, TEST, SIDE, BATCH, STEPS = 300, 500, 64, 32, 120
RATES = {"head": 1e-2, "SE blocks and head": 3e-3}  # the best of five each on examples/finetune.py --data mnist
_Pairs = tuple[torch.Tensor, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Trained:
    """One run: what learned, how many numbers that is, the accuracy on the test images in percent, and the seconds."""

    learned: str
    numbers: int
    accuracy: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Training:
    """Both runs. ``str(training)`` is a table."""

    runs: tuple[Trained, ...]

    def __str__(self) -> str:
        table = text_table(
            ("learns", "numbers", "test accuracy, %", "seconds"),
            [(r.learned, f"{r.numbers:,}", f"{r.accuracy:.1f}", f"{r.seconds:.0f}") for r in self.runs], left=("learns",))
        return f"{table}\n{TRAIN} digits, {STEPS} steps of {BATCH}, {TEST} digits to test on; the base is frozen in both runs"


def digits(transform: Callable[[Any], torch.Tensor]) -> tuple[_Pairs, _Pairs]:
    """scikit-learn's handwritten digits as images and labels: those to train on, and those to test on.

    Raises:
        SEInjectError: scikit-learn is not installed.
    """
    from PIL import Image

    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SEInjectError(f"the demo needs its extra ({error}): pip install 'se-inject[demo]'") from error
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[: TRAIN + TEST].tolist()
    images = torch.stack([
        transform(Image.fromarray((pixels[i].reshape(8, 8) * 15.9).astype("uint8")).convert("RGB")) for i in order])
    wanted = torch.tensor([int(labels[i]) for i in order])
    return (images[:TRAIN], wanted[:TRAIN]), (images[TRAIN:], wanted[TRAIN:])


def train(base: nn.Module, advance: Callable[[int], object]) -> tuple[Training, nn.Module, Iterator[_Pairs]]:
    """Train both; they begin with the same head and get the same batches. `base` is not changed.

    Args:
        base: A timm model with trained weights.
        advance: Called with the number of steps that have been done.

    Returns:
        The runs, the trained model with blocks, and batches of the test images.
    """
    from timm.data import create_transform, resolve_model_data_config

    transform: Any = create_transform(**resolve_model_data_config(base, args={"img_size": SIDE, "crop_pct": 1.0}))
    training, test = digits(transform)
    base = copy.deepcopy(base)
    torch.manual_seed(0)
    base.reset_classifier(10)  # type: ignore[operator]
    runs = []
    for learned, rate in RATES.items():
        model = copy.deepcopy(base)
        if "SE" in learned:
            freeze_base(inject(model))
        else:
            model.requires_grad_(False).get_classifier().requires_grad_(True)  # type: ignore[operator]
        since = time.perf_counter()
        _train(model, rate, training, advance)
        seconds = time.perf_counter() - since
        numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
        with torch.inference_mode():
            right = sum(int((model(x).argmax(1) == y).sum()) for x, y in _batches(test))
        runs.append(Trained(learned, numbers, 100 * right / TEST, seconds))
    return Training(tuple(runs)), model, _batches(test)


def _batches(pairs: _Pairs) -> Iterator[_Pairs]:
    yield from zip(*(t.split(2 * BATCH) for t in pairs))


def _train(model: nn.Module, rate: float, pairs: _Pairs, advance: Callable[[int], object]) -> None:
    """Train what has a gradient; the base's statistics stay as they are."""
    model.to(memory_format=torch.channels_last).eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=STEPS, pct_start=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        chosen = torch.randperm(TRAIN, generator=generator)[:BATCH]
        logits = model(pairs[0][chosen])
        nn.functional.cross_entropy(logits, pairs[1][chosen], label_smoothing=0.1).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        advance(1)
