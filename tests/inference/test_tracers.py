"""Optimized copies in what traces or scripts a model: they work where the plain model works, and compute the same."""

from __future__ import annotations

import io

import pytest
import timm
import torch
from torch import nn

import se_inject

from ..support.checks import randomise
from ..support.tiers import contract
from ..support.versions import needs_masks

X = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
NAMES = (
    "se_inject/test_convnext",
    *contract("test_resnet", "se_inject/test_resnet", "test_convnext", "se_inject/test_efficientnet_ln"))
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # torch.jit is deprecated, and so is torch.ao
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")]


def optimized(name, **options):
    return se_inject.optimize_for_inference(randomise(timm.create_model(name, **options)).eval())


def onnx(model):
    import onnxruntime

    file = io.BytesIO()
    torch.onnx.export(model, (X,), file, dynamo=False)
    session = onnxruntime.InferenceSession(file.getvalue())
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: X.numpy()})[0])


def script(model):
    return torch.jit.script(model)(X)


def trace(model):
    return torch.jit.trace(model, X)(X)


def fx(model):
    return torch.fx.symbolic_trace(model)(X)


def openvino(model):
    import openvino

    converted = openvino.convert_model(model, example_input=X)
    compiled = openvino.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(compiled(X.numpy())[0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("run", [onnx, script, trace, fx, *contract(openvino)])
def test_a_copy_in_a_tracer_computes_the_same(run, name):
    model = optimized(name)
    with torch.no_grad():
        expected = model(X)
        torch.testing.assert_close(run(model), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_a_scripted_transformer():
    model = optimized("se_inject/test_vit", img_size=96)
    with torch.no_grad():
        torch.testing.assert_close(script(model), model(X))


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_is_quantized(name):
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    model = optimized(name)
    with torch.no_grad():
        prepared = prepare_fx(model, get_default_qconfig_mapping(), (X,))
        torch.testing.assert_close(prepared(X), model(X), rtol=1e-3, atol=1e-4)
        assert convert_fx(prepared)(X).isfinite().all()


class Both(nn.Module):
    """A residual of two layers, with a factor and any number of arguments that it does not read."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x, scale=1.0, *more):
        return x + self.a(x) * self.b(x).mean((2, 3), keepdim=True) * scale


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.both = nn.Conv2d(3, 4, 1), Both()

    def forward(self, x, scale=1.0, more=()):
        return self.both(self.stem(x), scale, *more)


@pytest.mark.parametrize(
    "argument", [pytest.param({"attn_mask": torch.zeros(37, 37)}, marks=needs_masks), {"scale": 2.0}, {"more": (1,)}],
    ids=lambda a: next(iter(a)))
@pytest.mark.parametrize("mode", ["eval", "autocast", "gradient"])
def test_no_call_drops_an_argument(mode, argument):
    """A copy that was made for one value of an argument refuses another one, or computes what the model does."""
    model = timm.create_model("se_inject/test_vit", img_size=96).eval() if "attn_mask" in argument else Around().eval()
    copy = se_inject.optimize_for_inference(model, input_size=(3, 96, 96))
    x = X.clone().requires_grad_(mode == "gradient")
    with torch.autocast("cpu", enabled=mode == "autocast"), torch.set_grad_enabled(mode == "gradient"):
        torch.testing.assert_close(copy(x), model(x))
        try:
            found = copy(x, **argument)
        except se_inject.SEInjectError as error:
            assert "was optimized for one value of" in str(error)
        else:
            torch.testing.assert_close(found, model(x, **argument))
