"""Write a model as a program that runs without its Python: by torch.export, or as ONNX."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..capture.inputs import input_sizes
from ..errors import ConfigError, SEInjectError
from ..weights.writing import write_atomically

FORMATS = (".pt2", ".onnx")


def export(
    model: nn.Module, path: str | os.PathLike[str], *, input_size: tuple[int, ...] | None = None, dynamic_batch: bool = True,
) -> None:  # fmt: skip
    """Write `model` to `path` in eval mode; the file's ending says how. The model is not changed.

    Args:
        model: A model, injected or not, optimised or not.
        path: ``.pt2`` for `torch.export.load`, ``.onnx`` for an ONNX runtime (extra ``onnx``).
        input_size: (C, H, W) of the images; None is the model's own.
        dynamic_batch: Whether the program takes any number of images, or one.

    Raises:
        ConfigError: The ending is another.
        SEInjectError: torch cannot export the model, or the file cannot be written; what was at `path` is still there.
    """
    kind = Path(path).suffix
    if kind not in FORMATS:
        raise ConfigError(f"{str(path)!r} ends in {kind!r}: a program is written to {' or '.join(FORMATS)}")
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    images = torch.zeros(2 if dynamic_batch else 1, *(input_size or input_sizes(model)[0]), dtype=weight.dtype,
                         device=weight.device)
    shapes: Any = ({0: torch.export.Dim("batch")},) if dynamic_batch else None
    modes = [(m, m.training) for m in model.modules()]
    try:
        with torch.no_grad():
            program = torch.export.export(model.eval(), (images,), dynamic_shapes=shapes)
            write_atomically(path, lambda temporary: _write(program, kind, temporary))
    except SEInjectError:
        raise
    except Exception as error:
        raise SEInjectError(f"torch could not export {type(model).__name__} to {kind}: {error}") from error
    finally:
        for m, training in modes:
            m.training = training


def _write(program: torch.export.ExportedProgram, kind: str, path: str) -> None:
    if kind == ".pt2":
        with open(path, "wb") as file:
            torch.export.save(program, file)
        return
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise SEInjectError("to write ONNX, install the extra: pip install 'se-inject[onnx]'") from error
    written = torch.onnx.export(program, dynamo=True, verbose=False)
    assert written is not None
    written.save(path, external_data=False)
