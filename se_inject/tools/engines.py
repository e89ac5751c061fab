"""Run a model in an inference engine that reads ONNX files, to time it beside torch."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from ..inference.export import export

Program = Callable[[torch.Tensor], Any]


def program(model: nn.Module, images: torch.Tensor, engine: str) -> Program:
    """`model` as a program of an engine, for images as `images`, with torch's number of threads.

    Args:
        model: A model in eval mode, in float32, on the CPU.
        images: (N, C, H, W).
        engine: "onnxruntime" or "openvino".

    Returns:
        A function from images to a tuple of tensors, the model's outputs.

    Raises:
        ConfigError: The engine is not installed.
        SEInjectError: torch cannot export the model.
    """
    try:
        if engine == "openvino":
            compiled = openvino_model(model, images)
            return lambda images: tuple(torch.from_numpy(out.copy()) for out in compiled(images.numpy()).values())
        session = onnxruntime_session(model, images)
    except ImportError as error:
        raise ConfigError(f"--engine {engine}: it is not installed: pip install {engine}") from error
    name = session.get_inputs()[0].name
    return lambda images: tuple(map(torch.from_numpy, session.run(None, {name: images.numpy()})))


def onnxruntime_session(model: nn.Module, images: torch.Tensor, profile: str | None = None) -> Any:
    """An `onnxruntime.InferenceSession` of `model`; its profiler writes to a file whose name begins with `profile`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or its threads slow the next session
    options.log_severity_level = 3  # errors
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, profile
    with _written(model, images) as path:
        return onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])


def openvino_model(model: nn.Module, images: torch.Tensor, profile: bool = False) -> Any:
    """An `openvino.CompiledModel` of `model`; with `profile`, its requests have the time of each operator."""
    import openvino

    limits = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32", "PERF_COUNT": profile}
    core = openvino.Core()
    with _written(model, images) as path:
        read = core.read_model(path)
        read.reshape(list(images.shape))
        return core.compile_model(read, "CPU", limits)


@contextlib.contextmanager
def _written(model: nn.Module, images: torch.Tensor) -> Iterator[Path]:
    """The path of the model's ONNX file, which is there inside."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export(model, path, input_size=tuple(images.shape[1:]), dynamic_batch=len(images) > 1)
        yield path
