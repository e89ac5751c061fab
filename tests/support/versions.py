"""What the oldest torch and timm of the supported range lack: the tests of it are skipped there, with the reason."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import fx
from torch.distributed.nn.jit import instantiator

from se_inject.blocks.catalogue import get_block
from se_inject.errors import ConfigError
from se_inject.private import SEES_SAVED_TENSORS_HOOKS

TORCH = tuple(map(int, torch.__version__.split("+")[0].split(".")[:2]))
TIMM = tuple(map(int, timm.__version__.split(".")[:3]))
NEWEST = TORCH >= (2, 14) and TIMM >= (1, 0, 31)


def needs(has: bool, reason: str) -> pytest.MarkDecorator:
    """Skip a test where torch or timm has not what the test is about. The newest versions have all of it.

    Raises:
        AssertionError: `has` is false with the newest versions, where no test may be skipped for its version.
    """
    assert has or not NEWEST, f"torch {torch.__version__} and timm {timm.__version__}: {reason}"
    return pytest.mark.skipif(not has, reason=f"torch {torch.__version__}, timm {timm.__version__}: {reason}")


def needs_model(name: str, *values: Any, **options: Any) -> Any:
    """A parameter of a test: the name of a timm model, and further values. Skipped where timm has no such model."""
    return pytest.param(name, *values, marks=needs(timm.is_model(name), f"timm has no model {name}"), **options)


def _raises(call: Callable[[], object]) -> bool:
    try:
        call()
    except (AssertionError, ConfigError, RuntimeError, TypeError):
        return True
    return False


def _on_meta() -> None:
    with torch.device("meta"):
        timm.create_model("test_vit")


needs_norms_computed_again = needs(
    SEES_SAVED_TENSORS_HOOKS, "torch does not tell whether hooks change what autograd saves, so the output of a norm is saved")
needs_models_on_meta = needs(not _raises(_on_meta), "timm reads values while it creates a model, and so creates none on meta")
needs_masks = needs(
    "attn_mask" in inspect.signature(timm.models.vision_transformer.Block.forward).parameters,
    "a Block of timm's ViT takes no mask")
needs_intermediates = needs(
    hasattr(timm.models.VGG, "forward_intermediates"), "timm's VGG and Xception have no forward_intermediates")
needs_coordinate_attention = needs(not _raises(lambda: get_block("coord")), "timm has no coordinate attention")
needs_model_args = needs(
    hasattr(timm.models, "get_model_args"), "timm keeps no arguments of create_model, so that no file has them")
needs_arange_in_traces = needs(
    not _raises(lambda: fx.symbolic_trace(lambda x: torch.arange(x.shape[0]))), "fx cannot trace torch.arange of a traced size")
needs_newest = needs(NEWEST, "the pages show the newest versions")
needs_quiet_end = needs(
    not hasattr(instantiator, "_TEMP_DIR"), "torch leaves a temporary folder at the end of Python, which warns of it")
needs_local_dir = needs(not _raises(lambda: timm.models.parse_model_name("local-dir:a")), "timm does not know local-dir:")
needs_safetensors_in_torch_load = needs(
    "safetensors" in inspect.getsource(torch.serialization), "torch.load reads no safetensors")
needs_loads_on_meta = needs(
    TORCH >= (2, 7), "accelerate fills a model that is partly on meta only where it has a device map")
