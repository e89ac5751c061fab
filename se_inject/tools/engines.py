"""Run a model in an inference engine that reads ONNX files, to time it beside torch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
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
    load = {"onnxruntime": _onnxruntime, "openvino": _openvino}[engine]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export(model, path, input_size=tuple(images.shape[1:]), dynamic_batch=len(images) > 1)
        try:
            return load(path, tuple(images.shape))
        except ImportError as error:
            raise ConfigError(f"--engine {engine}: it is not installed: pip install {engine}") from error


def _onnxruntime(path: Path, _: tuple[int, ...]) -> Program:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # the threads of one session slow the next one
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: tuple(map(torch.from_numpy, session.run(None, {name: images.numpy()})))


def _openvino(path: Path, shape: tuple[int, ...]) -> Program:
    import openvino

    core = openvino.Core()
    read = core.read_model(path)
    read.reshape(list(shape))
    limits = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(read, "CPU", limits)
    return lambda images: tuple(torch.from_numpy(out.copy()) for out in compiled(images.numpy()).values())
