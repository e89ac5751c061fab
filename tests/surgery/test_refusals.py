"""What is refused before anything is done, with the call that works."""

from __future__ import annotations

import functools
import warnings

import pytest
import timm
import torch
from torch import nn

import se_inject
from se_inject.errors import ConfigError, SEInjectError, TraceError


@pytest.mark.parametrize("size", ["x", (3,), 224])
def test_a_wrong_input_size_is_said_wherever_a_model_is_run(size):
    model = timm.create_model("test_resnet").eval()
    with pytest.raises(ConfigError, match=r"expected \(C, H, W\)"):
        se_inject.optimize_for_inference(model, input_size=size)


def test_wrapped_models_are_refused_with_the_call_that_works():
    with pytest.raises(SEInjectError, match=r"inject\(model.module\)"):
        se_inject.inject(nn.DataParallel(timm.create_model("resnet18")))
    with pytest.raises(SEInjectError, match="_orig_mod"):
        se_inject.inject(torch.compile(timm.create_model("resnet18")))
    with pytest.raises(SEInjectError, match="create_model"):
        se_inject.inject("resnet18")


def test_errors_are_never_empty():
    with pytest.raises(ValueError, match="needs a message"):
        SEInjectError("")
    assert issubclass(se_inject.NoSitesError, ValueError) and issubclass(se_inject.NoSitesError, SEInjectError)


class Holder(nn.Module):
    """A model that holds another."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)


def with_child(child):
    model = se_inject.inject(timm.create_model("test_resnet")).eval()
    model.layer2 = child(model.layer2)
    return model


@pytest.fixture(scope="module")
def torchscript():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return with_child(torch.jit.script)


def export(model):
    from se_inject.inference.export import export

    export(model, "never_written.pt2")


TRACED = [se_inject.plan, se_inject.inject, se_inject.optimize_for_inference, export, se_inject.to_native,
          functools.partial(se_inject.fold, loader=[])]
FUNCTIONS = [*TRACED, se_inject.eject, se_inject.freeze_base]


def name_of(function):
    return getattr(function, "func", function).__name__


@pytest.mark.parametrize("function", TRACED, ids=name_of)
def test_a_compiled_module_is_named_by_its_path(function):
    what = name_of(function)
    with pytest.raises(TraceError) as error:
        function(with_child(torch.compile))
    assert str(error.value).startswith(f"{what}: its module 'layer2' is compiled")
    assert f"model.set_submodule('layer2', model.layer2._orig_mod), then {what}(model)" in str(error.value)


def test_the_advice_for_a_compiled_module_works():
    model = with_child(torch.compile)
    model.set_submodule("layer2", model.layer2._orig_mod)
    assert len(se_inject.plan(model).skipped) == 4


@pytest.mark.parametrize("function", FUNCTIONS, ids=name_of)
def test_a_scripted_module_is_named_by_its_path(function, torchscript):
    keys = list(torchscript.state_dict())
    with pytest.raises(TraceError, match=rf"^{name_of(function)}: its module 'layer2' is a TorchScript module: put the orig"):
        function(torchscript)
    assert list(torchscript.state_dict()) == keys


@pytest.mark.parametrize("function", FUNCTIONS, ids=name_of)
def test_a_wrapped_model_is_refused_by_every_function(function):
    what = name_of(function)
    with pytest.raises(TraceError, match=rf"^{what}: the model is wrapped by DataParallel: {what}\(model\.module\) first"):
        function(nn.DataParallel(se_inject.inject(timm.create_model("test_resnet"))))


def test_a_model_that_holds_an_injected_one_is_refused_with_its_path_or_works(tmp_path):
    model = Holder(Holder(se_inject.inject(timm.create_model("test_resnet")))).eval()
    model.net.net.pretrained_cfg["input_size"] = (3, 160, 160)
    path = r"its module 'net\.net' is (the|an) injected model"
    for function in (se_inject.to_native, functools.partial(se_inject.fold, loader=[]), se_inject.inject,
                     se_inject.freeze_base, functools.partial(se_inject.save, path=tmp_path / "x.safetensors")):
        with pytest.raises(SEInjectError, match=path):
            function(model)
    assert not list(tmp_path.iterdir())
    assert len(se_inject.plan(model).skipped) == 4 and len(se_inject.se_parameters(model)) == 16
    x = torch.randn(2, 3, 64, 64)
    assert torch.allclose(se_inject.optimize_for_inference(model)(x), model(x), atol=1e-5)
    assert not se_inject.block_paths(se_inject.eject(model))


def test_a_detector_is_pointed_at_its_network_on_images():
    detection = pytest.importorskip("torchvision.models.detection")
    detector = detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None).eval()
    with pytest.raises(TraceError, match=r"SSD: the run without values ended in .* such as its module 'backbone'"):
        se_inject.optimize_for_inference(detector)
    se_inject.optimize_for_inference(detector.backbone)


class Int8(torch.Tensor):
    """As the tensors of torchao and others."""

    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype)

    def __init__(self, data):
        self.data8, self.scale = (data * 100).to(torch.int8), 0.01

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args = torch.utils._pytree.tree_map_only(Int8, lambda t: t.data8.float() * t.scale, args)
        result = func(*args, **(kwargs or {}))
        return Int8(result) if func is torch.ops.aten.detach.default else result


class Packed(nn.Parameter):
    """As the parameters of bitsandbytes."""


def tensors_of_int8(model):
    model.fc.weight = nn.Parameter(Int8(model.fc.weight.detach()), requires_grad=False)


def packed(model):
    model.layer1[0].conv1.weight = Packed(torch.ones(4, dtype=torch.uint8), requires_grad=False)


def dynamic(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)


def by_transformers(model):
    model.hf_quantizer = object()


@pytest.mark.parametrize("quantize, where", [
    (tensors_of_int8, "module 'fc' is quantized.*'weight' is a Int8 of"), (packed, "layer1.0.conv1' is quantized.*Packed"),
    (dynamic, "module 'fc' is quantized.*torch.ao.nn.quantized"), (by_transformers, "the model is quantized")])
def test_quantized_models_are_refused(quantize, where):
    model = timm.create_model("test_resnet").eval()
    quantize(model)
    for what in (se_inject.plan, se_inject.inject, se_inject.optimize_for_inference):
        with pytest.raises(TraceError, match=rf"{what.__name__}: .*{where}.*: \w+ first, then quantize"):
            what(model)


def test_an_injected_model_can_be_quantized():
    model = se_inject.inject(timm.create_model("test_resnet")).eval()
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    tensors_of_int8(model)
    assert (model(x) - expected).abs().max() < 1 and len(se_inject.block_paths(model)) == 4
    assert se_inject.freeze_base(model) is model
    assert not se_inject.block_paths(se_inject.eject(model))
