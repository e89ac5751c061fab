"""All or nothing; and the injected model lives on: copies, pickles, traces, files in a new process."""

import copy
import functools
import io
import pickle
import subprocess
import sys
import threading
import warnings

import pytest
import timm
import torch
from timm.models._features_fx import get_notrace_functions, get_notrace_modules
from torch import fx, nn
from torchvision.models.feature_extraction import NodePathTracer

import se_inject
from se_inject.errors import ConfigError, SEInjectError
from se_inject.surgery import pipeline as surgery

from ..support.checks import randomise


def snapshot(model):
    return ([(n, type(m), m.training, sorted(m.__dict__)) for n, m in model.named_modules()],
            {k: (t.data_ptr(), t._version) for k, t in model.state_dict().items()})


@pytest.mark.parametrize("name, options, message", [
    ("seresnet18", {}, "already have channel attention"),
    ("resnet18", {"include": "nothing*"}, "no include pattern matches"),
    ("resnet18", {"input_size": (5, 64, 64)}, "input_size"),
    ("resnet18", {"act_layer": "nonsense"}, "nonsense"),
    ("vit_tiny_patch16_224", {"input_size": (3, 100, 100)}, "input_size"),
    ("vit_tiny_patch16_224", {"placement": "inner"}, "one convolution over space"),
])  # fmt: skip
def test_a_refused_model_is_as_it_was(name, options, message):
    model = timm.create_model(name)
    model.layer1.eval() if hasattr(model, "layer1") else model.blocks[0].eval()
    before = snapshot(model)
    with pytest.raises(SEInjectError, match=message):
        se_inject.inject(model, **options)
    assert snapshot(model) == before


def test_a_failure_in_the_middle_undoes_everything(monkeypatch):
    model = timm.create_model("resnet18")
    before = snapshot(model)
    real, calls = surgery.apply_edits, []

    def fail_at_third(*args):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError("third")
        real(*args)

    monkeypatch.setattr(surgery, "apply_edits", fail_at_third)
    with pytest.raises(MemoryError, match="third"):
        se_inject.inject(model)
    assert snapshot(model) == before


def test_plan_changes_nothing():
    model = timm.create_model("convnext_atto")
    before = snapshot(model)
    se_inject.plan(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("name, args", [("mobilenetv3_small_050", {"feature_cls": "hook"}), ("xception41p", {})])
def test_nothing_of_a_trace_stays_in_objects_that_modules_hold(name, args):
    model = timm.create_model(name, features_only=True, **args).eval()
    hooks = model.hooks
    assert hooks not in model.modules()

    def check():
        assert model.hooks is hooks and vars(hooks).keys() == before.keys()
        assert all(vars(hooks)[key] is value for key, value in before.items()) and not hooks._feature_outputs
        x = torch.randn(1, 3, 64, 64)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert all(map(torch.equal, twin(x), model(x)))
        hooks._feature_outputs.clear()

    before = dict(vars(hooks))
    se_inject.plan(model, input_size=(3, 64, 64), existing="stack")
    check()
    se_inject.inject(model, input_size=(3, 64, 64), existing="stack")
    check()
    se_inject.eject(model)
    check()


class Caches(nn.Module):
    """Keeps what it computes in containers inside objects inside containers."""

    class Kept:
        def __init__(self):
            self.values, self.last = {"all": [1, 2]}, None

    def __init__(self):
        super().__init__()
        self.conv, self.kept = nn.Conv2d(3, 8, 3), ([self.Kept()], {"one": self.Kept()})

    def forward(self, x):
        y = torch.relu(self.conv(x))
        for kept in (self.kept[0][0], self.kept[1]["one"]):
            kept.last = y
            kept.values["all"].append(y)
            kept.values[y] = y
        self.kept[1][y] = y
        return y


def test_nested_caches_are_as_they_were():
    model = Caches()
    (first,), named = model.kept
    se_inject.plan(model, input_size=(3, 16, 16))
    assert model.kept[0][0] is first and list(named) == ["one"]
    for kept in (first, named["one"]):
        assert kept.last is None and kept.values == {"all": [1, 2]}


def test_threads_wait_for_each_other_and_do_not_disturb_others():
    original, errors, ready, done = nn.Module.__call__, [], threading.Event(), threading.Event()
    other, x = timm.create_model("test_resnet").eval(), torch.randn(1, 3, 64, 64)
    expected = other(x)

    def guarded(work):
        try:
            work()
        except BaseException as error:
            errors.append(error)
        finally:
            ready.set()

    def serve():
        while not done.is_set():
            assert torch.equal(other(x), expected)
            ready.set()

    def change():
        for _ in range(2):
            model = se_inject.inject(timm.create_model("resnet14t"))
            se_inject.optimize_for_inference(model.eval())
            se_inject.eject(model)

    serving = threading.Thread(target=guarded, args=(serve,))
    serving.start()
    ready.wait()
    changing = [threading.Thread(target=guarded, args=(change,)) for _ in range(3)]
    for t in changing:
        t.start()
    for t in changing:
        t.join()
    done.set()
    serving.join()
    assert not errors
    assert nn.Module.__call__ is original


def test_flags_device_and_dtype_follow():
    model = timm.create_model("resnet18").to(torch.bfloat16)
    model.layer1.eval()
    se_inject.inject(model)
    assert not model.layer1[0].se.training and model.layer2[0].se.training and model.layer2.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with torch.device("meta"):
        skeleton = timm.create_model("resnet18")
    assert se_inject.inject(skeleton).layer1[0].se.fc1.weight.is_meta


@pytest.mark.parametrize("outside", [False, True])
def test_inference_mode(outside):
    """Weights that were made in it, and surgery in it or not: the blocks are made so that they can be trained."""
    with torch.inference_mode():
        model = timm.create_model("convnext_atto", depths=(1, 1, 1, 1)).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = model(x)
    with torch.inference_mode(not outside):
        assert se_inject.plan(model).sites
        se_inject.inject(model)
        fast = se_inject.optimize_for_inference(model, input_size=(3, 64, 64))
    assert not any(p.is_inference() for p in se_inject.se_parameters(model))
    with torch.inference_mode():
        assert torch.equal(model(x), expected)
        assert torch.allclose(fast(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", ["x", (3, 64), 224])
def test_a_wrong_input_size_is_said_wherever_a_model_is_run(size):
    model = timm.create_model("test_resnet").eval()
    with pytest.raises(ConfigError, match=r"expected \(C, H, W\)"):
        se_inject.optimize_for_inference(model, input_size=size)


def test_a_second_inject_finds_every_site_taken():
    model = se_inject.inject(timm.create_model("convnext_atto"))
    with pytest.raises(se_inject.NoSitesError, match="already have channel attention"):
        se_inject.inject(model)


def test_two_injections_of_different_stages_eject_together():
    model = timm.create_model("resnet18")
    keys = list(model.state_dict())
    se_inject.inject(model, stages=1, ratio=0.5)
    se_inject.inject(model, stages=2)
    se_inject.eject(model)
    assert list(model.state_dict()) == keys and "_se_injections" not in model.__dict__


def test_eject_without_blocks_says_so():
    with pytest.raises(SEInjectError, match="no injected blocks"):
        se_inject.eject(timm.create_model("resnet18"))


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


def test_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        se_inject.eject(se_inject.inject(timm.create_model("resnet18")))


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
    """A residual unit that branches on an argument."""

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


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated:FutureWarning")
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
torch.set_num_threads(1)
s = torch.load(d + "/sd.pt")
a = timm.create_model("se_inject/mobilenetv2_050", se_ratio=0.5).eval()
a.load_state_dict(s["sd"])
b = torch.load(d + "/model.pt", weights_only=False)
c = se_inject.load(d + "/m.safetensors")
with torch.no_grad():
    print(*[torch.equal(m(s["x"]), s["y"]) for m in (a, b, c)])
"""
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["True"] * 3


def test_a_class_that_was_changed_before_the_next_call_is_said():
    model = se_inject.inject(timm.create_model("convnext_atto")).eval()
    block = model.stages[0].blocks[0]
    block.use_conv_mlp = not block.use_conv_mlp
    block.__class__ = type("Sharded", (type(block),), {})
    with pytest.raises(SEInjectError, match="run the model once in between"):
        model(torch.randn(1, 3, 32, 32))
