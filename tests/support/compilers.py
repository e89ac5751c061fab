"""What compilers and exporters must do with an injected model."""

from __future__ import annotations

import copy
import io
import warnings

import torch
from torch import nn

from se_inject import block_paths

from .families import Family
from .frameworks import FEW, assert_equal, check, gradients
from .processes import output


@check("compile")
def compile_(model: nn.Module, family: Family) -> None:
    """`torch.compile(fullgraph=True)`: one graph; outputs equal with the `eager` backend."""
    torch._dynamo.reset()
    x = family.image()
    with torch.no_grad():
        assert_equal(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


@check("compile, train", only=(*FEW, "tiny_vit_5m_224"))
def compile_train(model: nn.Module, family: Family) -> None:
    """The same in train mode with `aot_eager`: the gradients are close."""
    torch._dynamo.reset()
    other = copy.deepcopy(model.train())
    mine = gradients(model, torch.compile(model, backend="aot_eager", fullgraph=True), family.image())
    torch.testing.assert_close(mine, gradients(other, other, family.image()), rtol=1e-3, atol=1e-3)


@check("inductor", only=FEW[1:])
def inductor(model: nn.Module, family: Family) -> None:
    """`torch.compile(fullgraph=True)` with its default backend: outputs close."""
    torch._dynamo.reset()
    x = family.image()
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):  # of modules that torch itself imports
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=1e-3, atol=1e-4)


_programs: dict[tuple[Family, bool], torch.export.ExportedProgram] = {}


def exported(model: nn.Module, family: Family, strict: bool = False) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=2, max=8)
    with warnings.catch_warnings(action="ignore"):  # of what a model keeps on itself
        return torch.export.export(model, (family.image(2),), dynamic_shapes=({0: batch},), strict=strict)


def exported_once(model: nn.Module, family: Family) -> torch.export.ExportedProgram:
    key = family, bool(block_paths(model))
    if key not in _programs:
        _programs.clear()
        _programs[key] = exported(model, family)
    return _programs[key]


@check("export")
def export(model: nn.Module, family: Family) -> None:
    """`torch.export` with a dynamic batch: outputs equal at another batch size."""
    program = exported_once(model, family)
    with torch.no_grad():
        assert_equal(program.module()(family.image(3)), model(family.image(3)))


@check("export, strict", only=("resnet18", "tiny_vit_5m_224"))
def export_strict(model: nn.Module, family: Family) -> None:
    """The same with `strict=True`."""
    program = exported(model, family, strict=True)
    with torch.no_grad():
        assert_equal(program.module()(family.image(3)), model(family.image(3)))


@check("ONNX")
def onnx(model: nn.Module, family: Family) -> None:
    """`torch.onnx.export(dynamo=True)` with a dynamic batch, run by ONNX Runtime: outputs within 1e-4 of the largest."""
    import onnxruntime

    buffer = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):
        program = torch.onnx.export(
            exported_once(model, family), dynamo=True, verbose=False, optimize=family.name in FEW)
    assert program is not None
    program.save(buffer)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(buffer.getvalue(), options, providers=["CPUExecutionProvider"])
    x = family.image(3)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected = output(model, x)
    torch.testing.assert_close(torch.from_numpy(y), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@check("script")
def script(model: nn.Module, family: Family) -> None:
    """`torch.jit.script`: outputs equal."""
    x = family.image()
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        assert_equal(torch.jit.script(model)(x), model(x))


@check("trace")
def trace(model: nn.Module, family: Family) -> None:
    """`torch.jit.trace`: outputs equal at another batch size."""
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        traced = torch.jit.trace(model, family.image(), check_trace=False)
        assert_equal(traced(family.image(3)), model(family.image(3)))
