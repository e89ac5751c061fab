"""Write a model as a program that runs without the model's Python code: with torch.export, or as ONNX."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..capture.inputs import input_sizes
from ..capture.snapshot import evaluating
from ..errors import ConfigError, SEInjectError
from ..surgery.refusals import refuse
from ..undo import entered
from ..weights.replacing import write_atomically

FORMATS = (".pt2", ".onnx")


def export(
    model: nn.Module, path: str | os.PathLike[str], *, input_size: tuple[int, ...] | None = None, dynamic_batch: bool = True,
) -> None:  # fmt: skip
    """Write `model`, in eval mode, to `path`; the ending of `path` is the format. The model is not changed.

    Args:
        model: A model, injected or not, optimized or not.
        path: ``.pt2`` for `torch.export.load`, ``.onnx`` for an ONNX runtime (extra ``onnx``).
        input_size: (C, H, W) of the images; None is the model's own.
        dynamic_batch: Whether the program takes any number of images; else it takes one.

    Raises:
        ConfigError: It is no model, or `path` has another ending.
        TraceError: The model is wrapped, compiled or scripted; the message gives the call that works.
        SEInjectError: The model has no values, torch cannot export it, or the file cannot be written. What was at `path` is
            still there.

    Shape:
        The program's inputs and outputs are the model's, with images of `input_size` alone.

    Example:
        >>> import os, tempfile, timm, torch
        >>> from se_inject.inference.export import export
        >>> model = timm.create_model("test_resnet").eval()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export(model, os.path.join(folder, "model.pt2"))
        ...     program = torch.export.load(os.path.join(folder, "model.pt2")).module()
        >>> x = torch.rand(3, 3, 160, 160)
        >>> torch.allclose(program(x), model(x), atol=1e-5)
        True
    """
    kind = Path(path).suffix
    if kind not in FORMATS:
        raise ConfigError(f"export: {str(path)!r} ends in {kind!r}: give a path that ends in {' or '.join(FORMATS)}")
    refuse(model, "export", optimized=True, values=True, quantized=True)
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    size = (2 if dynamic_batch else 1, *(input_size or input_sizes(model)[0]))
    images = torch.zeros(size, dtype=weight.dtype, device=weight.device)
    shapes: Any = ({0: torch.export.Dim("batch")},) if dynamic_batch else None
    try:
        with entered(torch.no_grad()), evaluating(model):
            program = torch.export.export(model, (images,), dynamic_shapes=shapes, strict=False)  # strict in torch 2.6
            write_atomically(path, lambda temporary: _write(program, kind, temporary))
    except SEInjectError:
        raise
    except Exception as error:
        raise SEInjectError(f"export: torch could not export {type(model).__name__} to {kind}: {error}") from error


def _write(program: torch.export.ExportedProgram, kind: str, path: str) -> None:
    if kind == ".pt2":
        with open(path, "wb") as file:
            torch.export.save(program, file)
        return
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise SEInjectError("export: to write ONNX, install the extra: pip install 'se-inject[onnx]'") from error
    written = torch.onnx.export(program, dynamo=True, optimize=True, verbose=False)
    assert written is not None
    _means_to_poolings(written.model)
    written.save(path, external_data=False)


def _means_to_poolings(model: Any) -> None:
    """Write the means over the last two of four axes as poolings, in place.

    ONNX Runtime keeps maps in blocks of channels, and brings them back to NCHW for an operator that does not work on blocks.
    GlobalAveragePool does; ReduceMean does not.
    """
    from onnx_ir import DataType
    from onnx_ir.passes.common import RemoveUnusedNodesPass
    from onnxscript.rewriter import pattern

    def is_pooling(_: Any, x: Any, axes: Any, mean: Any) -> bool:
        dims = axes.const_value
        return dims is not None and x.shape is not None and len(x.shape) == 4 and (
            x.dtype in (DataType.FLOAT, DataType.FLOAT16)) and sorted(d % 4 for d in dims.numpy()) == [2, 3]

    def pooling(op: Any, x: Any, axes: Any, mean: Any) -> Any:
        pooled = op.GlobalAveragePool(x)
        return pooled if mean.producer().attributes.get_int("keepdims", 1) else op.Flatten(pooled)

    rule = pattern.RewriteRule(lambda op, x, axes: op.ReduceMean(x, axes, _outputs=["mean"]), pooling, is_pooling)
    rule.apply_to_model(model)
    RemoveUnusedNodesPass()(model)  # such as the axes of the means
