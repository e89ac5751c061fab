"""se_inject puts squeeze-and-excitation into any timm model and keeps its pretrained weights."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

from .undo import entered as _entered
from .undo import import_lock as _import_lock

if TYPE_CHECKING:
    from .blocks.catalogue import register_block as register_block
    from .capture.inputs import input_sizes as input_sizes
    from .config import SEConfig as SEConfig
    from .errors import NoSitesError as NoSitesError
    from .errors import SEInjectError as SEInjectError
    from .find.plan import Plan as Plan
    from .inference.optimize import optimize_for_inference as optimize_for_inference
    from .inference.report import OptimizedModel as OptimizedModel
    from .rescale.fold import fold as fold
    from .rescale.gate_report import GateReport as GateReport
    from .rescale.native import NativeWeights as NativeWeights
    from .rescale.native import to_native as to_native
    from .rescale.read_gates import gates as gates
    from .rescale.report import FoldReport as FoldReport
    from .site import Site as Site
    from .surgery.freezing import freeze_base as freeze_base
    from .surgery.freezing import se_parameters as se_parameters
    from .surgery.freezing import unfreeze_base as unfreeze_base
    from .surgery.pipeline import eject as eject
    from .surgery.pipeline import inject as inject
    from .surgery.pipeline import plan as plan
    from .surgery.state import block_paths as block_paths
    from .surgery.trainable import Trainable as Trainable
    from .surgery.trainable import trainable as trainable
    from .weights.files import load as load
    from .weights.files import save as save

__version__ = "0.1.0"

# Loaded on first use, so that `import se_inject` and `se-inject --help` cost no import of torch.
_HOMES = {
    "SEConfig": "config", "SEInjectError": "errors", "NoSitesError": "errors", "Site": "site", "Plan": "find.plan",
    "plan": "surgery.pipeline", "inject": "surgery.pipeline", "eject": "surgery.pipeline",
    "block_paths": "surgery.state", "input_sizes": "capture.inputs",
    "trainable": "surgery.trainable", "Trainable": "surgery.trainable",
    "se_parameters": "surgery.freezing", "freeze_base": "surgery.freezing", "unfreeze_base": "surgery.freezing",
    "save": "weights.files", "load": "weights.files", "register_block": "blocks.catalogue",
    "optimize_for_inference": "inference.optimize", "OptimizedModel": "inference.report", "OptimisedModel": "inference.report",
    "gates": "rescale.read_gates", "GateReport": "rescale.gate_report",
    "fold": "rescale.fold", "FoldReport": "rescale.report", "to_native": "rescale.native", "NativeWeights": "rescale.native",
}  # fmt: skip
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'se_inject' has no attribute {name!r}")
    with _entered(_import_lock):
        value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


def _on_timm(timm: Any) -> None:
    from .timm_registry import register

    register()


wrapt.register_post_import_hook(_on_timm, "timm")
