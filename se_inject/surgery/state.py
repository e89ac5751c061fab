"""What an injected model keeps: its injections, and on each owner what was done to it. No other file spells the attributes."""

from __future__ import annotations

import copy
import dataclasses
import glob
from typing import Any

from torch import fx, nn

from ..capture.example import Inputs, to_json
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
    """All that is done to one owner; the owner keeps it, so that it can be undone and done again.

    `kind` is ``fill``, ``insert``, ``graph`` or ``rewrite``. `constants` are the arguments that the trace holds fixed,
    `decisions` the outcomes of the conditions on sizes in the forward. `forms` are the forms of what its children returned,
    by path, where the forward has ``**kwargs``. `original` is what stood in a filled slot: the
    module, or None with where it was kept; or the graphs of a GraphModule, by attribute.
    """

    kind: str
    edits: tuple[Edit, ...]
    constants: tuple[tuple[str, Any], ...] = ()
    decisions: tuple[bool, ...] = ()
    original: Any = None
    original_registered: bool = False
    forms: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Injection:
    """What one call of `inject` did; a model keeps all of its own, in order."""

    config: SEConfig
    sites: tuple[Site, ...]
    inputs: Inputs = None  # where they were asked for

    def written(self) -> SEConfig:
        """The options as they go to a file: the sites that a `filter_fn` chose are there by name."""
        if self.config.filter_fn is None:
            return self.config
        return dataclasses.replace(
            self.config, filter_fn=None, include=tuple(glob.escape(s.path) for s in self.sites), exclude=None)

    def written_inputs(self) -> Any:
        """What it was run on, as JSON types."""
        return to_json(self.inputs)


_INSIDE = "_se_inside"  # of a module or a parameter in a block: its path there
_EDITS, _INJECTIONS = "_se_edits", "_se_injections"  # attributes of an owner and of a model
BASE = "_se_base"  # of a generated class: the class that it is derived from
OPTIMIZED = "_se_code"  # of a class that `optimize_for_inference` generated: its sources
REPORT = "se_report"  # of an optimized model


def edits_of(module: nn.Module) -> OwnerEdits | None:
    """What was done to an owner; None for a module without blocks of its own."""
    edits: OwnerEdits | None = module.__dict__.get(_EDITS)
    return edits


def set_edits(module: nn.Module, edits: OwnerEdits | None) -> None:
    """Let an owner keep what was done to it, or forget it."""
    if edits is None:
        module.__dict__.pop(_EDITS, None)
    else:
        module.__dict__[_EDITS] = edits


def slots_of(module: nn.Module) -> list[str]:
    """Names of the blocks among an owner's children."""
    edits = edits_of(module)
    return [] if edits is None else [edit.slot for edit in edits.edits]


def edited_owners(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that have blocks of their own."""
    return [m for m in model.modules() if edits_of(m) is not None]


def base_class(module: nn.Module) -> type[nn.Module]:
    """The class that an owner had before it was rewritten."""
    base: type[nn.Module] = getattr(type(module), BASE, type(module))
    return base


def has_generated_class(module: nn.Module) -> bool:
    """Whether a module's class is generated; not where another library has derived one from that since."""
    return BASE in type(module).__dict__


def is_optimized(model: nn.Module) -> bool:
    """Whether a model, or a part of it, came out of `optimize_for_inference`."""
    return any(REPORT in m.__dict__ or OPTIMIZED in type(m).__dict__ for m in model.modules())


def replaced_modules(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """What stood in the slots that blocks fill, by owner, where it has weights: attention that `eject` puts back."""
    found = {m: edits.original for m in model.modules() if (edits := edits_of(m)) is not None}
    return {m: old for m, old in found.items() if isinstance(old, nn.Module) and any(True for _ in old.parameters())}


def forget_replaced(model: nn.Module) -> None:
    """Take its values from what blocks replaced: the base, which was made for a file, has never had the weights of that."""
    for owner, old in replaced_modules(model).items():
        edits = edits_of(owner)
        assert edits is not None
        set_edits(owner, dataclasses.replace(edits, original=copy.deepcopy(old).to("meta")))


def injections_of(model: nn.Module) -> tuple[Injection, ...]:
    """What was injected into `model`, in order."""
    done: tuple[Injection, ...] = model.__dict__.get(_INJECTIONS, ())
    return done


def given_inputs(model: nn.Module) -> Inputs:
    """What the last injection that was given inputs was run on."""
    return next((i.inputs for i in reversed(injections_of(model)) if i.inputs is not None), None)


def set_injections(model: nn.Module, injections: tuple[Injection, ...]) -> None:
    """Let a model keep what was injected into it; with none, forget it."""
    if injections:
        model.__dict__[_INJECTIONS] = injections
    else:
        model.__dict__.pop(_INJECTIONS, None)


def block_paths(model: nn.Module) -> list[str]:
    """Return the dotted names of the injected blocks, in the order of the model's modules. Changes nothing.

    Args:
        model: A model, with or without blocks; or what fx has traced of one, such as torchvision's feature extractors.

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
    traced = any(isinstance(m, fx.GraphModule) for m in model.modules()) and not is_optimized(model)
    found: dict[str, None] = {}
    for path, m in model.named_modules():
        found.update(dict.fromkeys(f"{path}.{slot}" if path else slot for slot in slots_of(m)))
        if traced:
            found.update(dict.fromkeys(_around(path, m)))
    return list(found)


def mark_inside(block: nn.Module) -> None:
    """Let the parts of a block keep their paths in it: a trace by fx takes parts over, and neither block nor owner."""
    for path, m in block.named_modules():
        if path:
            m.__dict__[_INSIDE] = path
    for name, p in block._parameters.items():
        if p is not None:
            p.__dict__[_INSIDE] = name


def _around(path: str, module: nn.Module) -> list[str]:
    """The block of which a module is a part, or has a parameter; the module itself where its name is another one there."""
    inside = module.__dict__.get(_INSIDE)
    if inside is not None:
        return [path.removesuffix(f".{inside}")]
    return [path] if any(_INSIDE in p.__dict__ for p in module._parameters.values() if p is not None) else []


def head_paths(model: nn.Module) -> list[str]:
    """Dotted names of a timm model's classifiers; none where it has no weights there."""
    get: Any = getattr(model, "get_classifier", None)
    try:
        found = get() if get is not None else None
    except AttributeError:  # a feature wrapper, which has lost it
        return []
    heads = found if isinstance(found, (tuple, list)) else [found]
    return [path for path, m in model.named_modules() if any(m is head for head in heads) and path]
