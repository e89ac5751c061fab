"""The injected model lives on: copies, pickles, scripts, and in a new process."""

import copy
import functools
import io

import pytest
import timm
import torch
from timm.models._features_fx import get_notrace_functions, get_notrace_modules
from torch import fx, nn
from torchvision.models.feature_extraction import NodePathTracer

import se_inject
from se_inject.errors import SEInjectError

from ..support.checks import randomise
from ..support.processes import fresh


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "vit_tiny_patch16_224", "densenet121", "nf_resnet26"])
def test_copies_are_equal(name):
    model = randomise(se_inject.inject(timm.create_model(name))).eval()
    size = 224 if name.startswith("vit") else 64
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(copy.deepcopy(model)(x), expected)
        assert torch.equal(copy.copy(model)(x), expected)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        assert torch.equal(torch.load(buffer, weights_only=False)(x), expected)
        tracer = NodePathTracer(leaf_modules=get_notrace_modules(), autowrap_functions=tuple(get_notrace_functions()))
        assert torch.equal(fx.GraphModule(model, tracer.trace(model))(x), expected)


class Unit(nn.Module):
    """A residual unit that branches on an argument. A script reads the annotations, which are no strings in this file."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.act = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()

    def forward(self, x, more: torch.Tensor | None = None, twice: bool = False):
        y = self.conv2(self.act(self.conv1(x)))
        if more is not None:
            y = y + more
        if twice:
            y = y * 2
        return x + y


class Units(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.unit, self.head = nn.Conv2d(3, 8, 3), Unit(), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.unit(self.stem(x)).mean((2, 3)))


@pytest.mark.parametrize("make", [Units, functools.partial(timm.create_model, "convnext_atto", depths=(1, 1, 1, 1))])
def test_scripting_is_no_change(make):
    model = randomise(se_inject.inject(make(), input_size=(3, 32, 32))).eval()
    classes = [type(m) for m in model.modules()]
    x = torch.randn(2, 3, 32, 32)
    scripted = torch.jit.script(model)
    with torch.no_grad():
        assert torch.equal(scripted(x), model(x))
    assert [type(m) for m in model.modules()] == classes


def test_a_copy_of_a_rewritten_model_is_independent():
    model = se_inject.inject(timm.create_model("convnext_atto")).eval()
    twin = copy.deepcopy(model)
    x = torch.randn(1, 3, 64, 64)
    expected = model(x)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert torch.equal(model(x), expected)
    se_inject.eject(twin)
    assert torch.equal(model(x), expected)


@pytest.mark.xdist_group("processes")
def test_a_new_process_gives_the_same(tmp_path):
    torch.manual_seed(0)
    model = randomise(timm.create_model("se_inject/mobilenetv2_050", se_ratio=0.5)).eval()
    x = torch.randn(2, 3, 64, 64)
    torch.save({"sd": model.state_dict(), "x": x, "y": model(x).detach()}, tmp_path / "sd.pt")
    torch.save(model, tmp_path / "model.pt")
    se_inject.save(model, tmp_path / "m.safetensors")
    code = """
import sys, torch, timm, se_inject
d = sys.argv[1]
s = torch.load(d + "/sd.pt")
a = timm.create_model("se_inject/mobilenetv2_050", se_ratio=0.5).eval()
a.load_state_dict(s["sd"])
b = torch.load(d + "/model.pt", weights_only=False)
c = se_inject.load(d + "/m.safetensors")
with torch.no_grad():
    print(*[torch.equal(m(s["x"]), s["y"]) for m in (a, b, c)])
"""
    done = fresh(code, tmp_path)
    assert done.stdout.split() == ["True"] * 3, done.stderr


def test_a_class_that_was_changed_before_the_next_call_is_said():
    model = se_inject.inject(timm.create_model("convnext_atto")).eval()
    block = model.stages[0].blocks[0]
    block.use_conv_mlp = not block.use_conv_mlp
    block.__class__ = type("Sharded", (type(block),), {})
    with pytest.raises(SEInjectError, match="run the model once in between"):
        model(torch.randn(1, 3, 32, 32))
