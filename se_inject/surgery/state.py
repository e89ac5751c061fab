"""TODO"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from ..config import SEConfig
from ..site import Site


@dataclasses.dataclass(frozen=True)
class Edit:
    """One block in one owner.

    `after` is the child that it is registered behind, as its author would have written it; empty is
    the first place. `node` is the position of the gated node in the owner's traced graph, `name` its
    name there (a check), and `users` the positions of the nodes that get the gated value; None is all.
    """

    slot: str
    after: str
    node: int = 0
    name: str = ""
    users: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class OwnerEdits:
    """All that is done to one owner; kept on it as ``_se_edits``, so that it can be undone and rebuilt.

    `way` is ``fill``, ``insert``, ``graph`` or ``rewrite``. `constants` are the arguments that the trace held
    fixed, `decisions` the way that it went where the forward branches on sizes. `original` is what stood in
    a filled slot: the module, or None with where it was kept; or the graphs of a GraphModule, by attribute.
    """

    way: str
    edits: tuple[Edit, ...]
    constants: tuple[tuple[str, Any], ...] = ()
    decisions: tuple[bool, ...] = ()
    original: Any = None
    original_registered: bool = False


def base_class(module: nn.Module) -> type[nn.Module]:
    """The class that an owner had before it was rewritten."""
    base: type[nn.Module] = getattr(type(module), "_se_base", type(module))
    return base


def edited_owners(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if "_se_edits" in m.__dict__]


@dataclasses.dataclass(frozen=True)
class Injection:
    """What one call of `inject` did; a model keeps all of its own, in order, as ``_se_injections``."""

    config: SEConfig
    sites: tuple[Site, ...]
    input_size: tuple[int, ...] | None = None  # where it was asked for

    def written(self) -> SEConfig:
        """The options as they go to a file: the sites that a `filter_fn` chose are there by name."""
        if self.config.filter_fn is None:
            return self.config
        return dataclasses.replace(
            self.config, filter_fn=None, include=tuple(s.path for s in self.sites), exclude=None)


def injections_of(model: nn.Module) -> tuple[Injection, ...]:
    """What was injected into `model`, in order."""
    done: tuple[Injection, ...] = model.__dict__.get("_se_injections", ())
    return done


def block_paths(model: nn.Module) -> list[str]:
    """Return the dotted names of the injected blocks, in the order of the model's modules. Changes nothing.

    Args:
        model: A model, with or without blocks.

    Returns:
        The names, for `get_submodule`; none for a model without blocks.

    Example:
        >>> import se_inject, timm
        >>> model = se_inject.inject(timm.create_model("test_resnet"), stages=(1, 2))
        >>> se_inject.block_paths(model)
        ['layer1.0.se', 'layer2.0.se']
        >>> model.get_submodule("layer1.0.se")
        SqueezeExcite(
          32, layout=NCHW, gain=2
          (fc1): Conv2d(32, 8, kernel_size=(1, 1), stride=(1, 1))
          (act): ReLU(inplace=True)
          (fc2): Conv2d(8, 32, kernel_size=(1, 1), stride=(1, 1))
          (gate): Sigmoid()
        )
    """
    return [
        f"{path}.{edit.slot}" if path else edit.slot
        for path, m in model.named_modules() if "_se_edits" in m.__dict__ for edit in m.__dict__["_se_edits"].edits]


def head_paths(model: nn.Module) -> list[str]:
    """Dotted names of a timm model's classifiers; none where it has no weights there."""
    get: Any = getattr(model, "get_classifier", None)
    try:
        found = get() if get is not None else None
    except AttributeError:  # a feature wrapper, which has lost it
        return []
    heads = found if isinstance(found, (tuple, list)) else [found]
    return [path for path, m in model.named_modules() if any(m is head for head in heads) and path]
