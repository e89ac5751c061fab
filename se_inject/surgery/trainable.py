"""What learns: the parameters with a gradient, counted by part."""

from __future__ import annotations

import dataclasses

from torch import nn
from torch.nn.parameter import is_lazy

from ..errors import ConfigError
from ..tables import text_table
from .parts import module_of, norm_parameters
from .state import block_paths, head_paths

_PARTS = ("blocks", "norms", "head", "base")


@dataclasses.dataclass(frozen=True)
class Count:
    """Parameters of one part of a model.

    Attributes:
        tensors: How many learn.
        numbers: How many numbers these hold.
        of_tensors: How many there are.
        of_numbers: How many numbers there are.
    """

    tensors: int = 0
    numbers: int = 0
    of_tensors: int = 0
    of_numbers: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other))))


@dataclasses.dataclass(frozen=True)
class Trainable:
    """What learns in a model. ``str(report)`` is a table.

    Attributes:
        blocks: The injected blocks.
        norms: The norms of the base, without those in the head.
        head: The classifier that the model's ``get_classifier()`` returns.
        base: The rest of the base.

    Example:
        >>> import se_inject, timm
        >>> report = se_inject.trainable(timm.create_model("test_resnet"))
        >>> report.blocks.of_tensors, report.head.tensors, report.total.tensors == report.total.of_tensors
        (0, 2, True)
    """

    blocks: Count
    norms: Count
    head: Count
    base: Count

    @property
    def total(self) -> Count:
        """All parts together."""
        return self.blocks + self.norms + self.head + self.base

    def __str__(self) -> str:
        rows = [
            (name, f"{c.tensors:,}", f"of {c.of_tensors:,}", f"{c.numbers:,}", f"of {c.of_numbers:,}")
            for name, c in ((name, getattr(self, name)) for name in (*_PARTS, "total"))]
        return text_table(("learns", "tensors", "", "numbers", ""), rows, left=("learns",))


def trainable(model: nn.Module) -> Trainable:
    """Count what learns in a model, by part: the parameters with ``requires_grad``. Changes nothing.

    A parameter that several modules share is counted once. Numbers of lazy parameters, whose shape is not known, are not
    counted.

    Args:
        model: Any module, injected or not, frozen or not.

    Returns:
        The report; print it.

    Raises:
        ConfigError: `model` is not a module.

    Example:
        >>> import se_inject, timm
        >>> model = timm.create_model("se_inject/test_resnet", num_classes=10)
        >>> print(se_inject.trainable(se_inject.freeze_base(model, norms=True)))
        learns  tensors         numbers
        blocks       16  of 16    9,368    of 9,368
        norms        30  of 30    2,080    of 2,080
        head          2   of 2      970      of 970
        base          0  of 15        0  of 370,608
        total        48  of 63   12,418  of 383,026
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"trainable({model!r}) needs a model, such as timm.create_model(...) returns")
    blocks, heads, norms = block_paths(model), head_paths(model), norm_parameters(model)
    found = dict.fromkeys(_PARTS, Count())
    for name, p in model.named_parameters():
        if module_of(name, blocks) is not None:
            part = "blocks"
        elif module_of(name, heads) is not None:
            part = "head"
        else:
            part = "norms" if name in norms else "base"
        n = 0 if is_lazy(p) else p.numel()
        found[part] += Count(int(p.requires_grad), n * p.requires_grad, 1, n)
    return Trainable(**found)
