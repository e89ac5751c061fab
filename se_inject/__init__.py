"""se_inject puts squeeze-and-excitation into any timm model and keeps its pretrained weights."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from .blocks import register_block as register_block
    from .config import SEConfig as SEConfig
    from .errors import NoSitesError as NoSitesError
    from .errors import SEInjectError as SEInjectError
    from .fold_report import FoldReport as FoldReport
    from .folding import fold as fold
    from .inference import optimize_for_inference as optimize_for_inference
    from .inference_report import OptimisedModel as OptimisedModel
    from .native import NativeWeights as NativeWeights
    from .native import to_native as to_native
    from .planning import Plan as Plan
    from .planning import Site as Site
    from .surgery import eject as eject
    from .surgery import inject as inject
    from .surgery import plan as plan
    from .training import freeze_base as freeze_base
    from .training import se_parameters as se_parameters
    from .training import unfreeze_base as unfreeze_base
    from .weights import load as load
    from .weights import save as save

__version__ = "0.1.0"

# Loaded on first use, so that `import se_inject` and `se-inject --help` cost no import of torch.
_HOMES = {
    "SEConfig": "config", "SEInjectError": "errors", "NoSitesError": "errors", "plan": "surgery", "inject": "surgery",
    "eject": "surgery", "Plan": "planning", "Site": "planning", "save": "weights", "load": "weights",
    "register_block": "blocks", "se_parameters": "training", "freeze_base": "training", "unfreeze_base": "training",
    "optimize_for_inference": "inference", "OptimisedModel": "inference_report",
    "fold": "folding", "FoldReport": "fold_report", "to_native": "native", "NativeWeights": "native",
}  # fmt: skip
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'se_inject' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


def _on_timm(timm: Any) -> None:
    from .registry import register

    register(timm)


wrapt.register_post_import_hook(_on_timm, "timm")
