"""A model as a program: what is written, what is refused, and what stays as it was."""

import pytest
import torch
from torch import nn

import se_inject
from se_inject.inference.export import export

from ..support.versions import TORCH
from .test_optimize import deviation, image, made


@torch.no_grad()
@pytest.mark.parametrize("dynamic_batch", [True, False])
@pytest.mark.parametrize("optimized", [False, True])
def test_a_program_computes_what_the_model_does_in_eval_mode(tmp_path, optimized, dynamic_batch):
    model = se_inject.inject(made("test_resnet"))
    x = image(model, batch=3 if dynamic_batch else 1)
    expected = model.eval()(x)
    if optimized:
        model = se_inject.optimize_for_inference(model)
    else:
        model.train().layer1.eval()
    modes = [m.training for m in model.modules()]
    export(model, tmp_path / "model.pt2", dynamic_batch=dynamic_batch)
    assert [m.training for m in model.modules()] == modes
    assert deviation(expected, torch.export.load(tmp_path / "model.pt2").module()(x)) < 1e-5


class Means(nn.Module):
    def forward(self, x):
        pooled = x.mean((2, 3)), nn.functional.adaptive_avg_pool2d(x, 1)
        return *pooled, x.double().mean((2, 3)), x.mean(1), x.mean((1, 2)), x.mean(), x.flatten(1).mean(1), x[0].mean((1, 2))


@torch.no_grad()
@pytest.mark.parametrize("dynamic_batch", [True, False])
def test_in_onnx_a_mean_over_all_positions_is_a_pooling(tmp_path, dynamic_batch):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path, model = tmp_path / "model.onnx", nn.Sequential(nn.Conv2d(3, 4, 1), Means())
    export(model, path, input_size=(3, 5, 6), dynamic_batch=dynamic_batch)
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds.count("GlobalAveragePool") == 2 and kinds.count("ReduceMean") == 6
    x = torch.rand(3 if dynamic_batch else 1, 3, 5, 6)
    found = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"input": x.numpy()})
    for ours, expected in zip(found, model(x), strict=True):
        assert ours.shape == expected.shape and deviation(expected, torch.from_numpy(ours)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("dynamic_batch", [pytest.param(True, marks=pytest.mark.xfail(
    TORCH == (2, 6), reason="torch 2.6 exports no addcmul for any number of images",
    raises=se_inject.SEInjectError)), False])  # fmt: skip
def test_in_onnx_the_gates_of_a_copy_are_pooled(tmp_path, dynamic_batch):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path, model = tmp_path / "model.onnx", se_inject.inject(made("test_resnet")).eval()
    blocks = len(se_inject.block_paths(model))
    export(se_inject.optimize_for_inference(model), path, dynamic_batch=dynamic_batch)
    graph = onnx.load(path).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("GlobalAveragePool") == blocks + 1 and "ReduceMean" not in kinds
    stored = {tensor.name for tensor in graph.initializer}  # or quantizers do not find the weights
    assert {node.input[1] for node in graph.node if node.op_type in ("Conv", "Gemm")} <= stored
    x = image(model, batch=3 if dynamic_batch else 1)
    found = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})
    assert deviation(model(x), torch.from_numpy(found[0])) < 1e-5


class Untraceable(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_where_torch_cannot_export_the_file_and_the_modes_stay(tmp_path):
    path = tmp_path / "model.pt2"
    path.write_text("here before")
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Untraceable().eval())
    with pytest.raises(se_inject.SEInjectError, match="could not export Sequential"):
        export(model, path, input_size=(3, 8, 8))
    assert path.read_text() == "here before" and list(tmp_path.iterdir()) == [path]
    assert [m.training for m in model.modules()] == [True, True, False]


@pytest.mark.parametrize("wrap, works", [
    (nn.DataParallel, r"export\(model\.module\)"), (torch.compile, r"model\._orig_mod"),
    (lambda m: torch.jit.trace(m, torch.zeros(1, 3, 8, 8)), "original model"), (lambda m: m.to("meta"), "load its weights"),
    (lambda m: nn.Sequential(m, nn.LazyLinear(1)), "run the model on one batch"), (lambda m: "resnet50", "needs a model"),
], ids=["DataParallel", "compiled", "scripted", "meta", "lazy", "name"])
def test_refusals_say_what_to_write_instead(tmp_path, wrap, works):
    with pytest.raises(se_inject.SEInjectError, match=works):
        export(wrap(nn.Conv2d(3, 4, 1)), tmp_path / "model.pt2", input_size=(3, 8, 8))
    assert not list(tmp_path.iterdir())


def test_the_ending_is_the_format(tmp_path):
    with pytest.raises(se_inject.SEInjectError, match=r"ends in '\.pt': give a path that ends in \.pt2 or \.onnx"):
        export(nn.Conv2d(3, 4, 1), tmp_path / "model.pt")
