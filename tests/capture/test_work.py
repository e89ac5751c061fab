"""What inject, load and save cost, counted: traces, files opened, tensors read, memory passed over. Nothing here is timed."""

from collections import Counter

import pytest
import safetensors.torch
import timm
import torch
from click.testing import CliRunner
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import se_inject
from se_inject.capture import tracer
from se_inject.capture.forward import _OwnTracer, trace_forward
from se_inject.capture.graphs import same_graph
from se_inject.capture.snapshot import on_meta as abstract
from se_inject.cli import main
from se_inject.errors import Refusal
from se_inject.timm_names import skeleton

from ..support.checks import randomise
from ..support.families import FAMILIES


class FxTracer(_OwnTracer):
    """The same tracer without what makes it quick."""

    trace = fx.Tracer.trace
    proxy = fx.Tracer.proxy
    create_arg = fx.Tracer.create_arg
    call_module = fx.Tracer.call_module
    tensor_attrs = None

    def is_leaf_module(self, m, module_qualified_name):
        return True


def _traced(module):
    try:
        return trace_forward(module, {})
    except Refusal as error:
        return str(error)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_the_quick_tracer_gives_fx_own_graphs(family, monkeypatch):
    """But for ``x += y``, which fx takes for ``x + y``."""
    model = family.create()
    with abstract(model):
        with tracer.patched():
            mine = {name: _traced(m) for name, m in model.named_modules()}
        monkeypatch.setattr("se_inject.capture.forward._OwnTracer", FxTracer)
        for name, m in model.named_modules():
            theirs = _traced(m)
            if isinstance(theirs, str) or isinstance(mine[name], str):
                assert str(mine[name]).partition(":")[0] == str(theirs).partition(":")[0]
            else:
                for n in mine[name].nodes:
                    n.target = tracer.IN_PLACE.get(n.target, n.target)
                assert same_graph(mine[name], theirs, {})
                assert [n.name for n in mine[name].nodes] == [n.name for n in theirs.nodes]


def test_one_trace_for_modules_that_are_alike(monkeypatch):
    count = Counter()
    trace = _OwnTracer.trace
    monkeypatch.setattr(_OwnTracer, "trace", lambda self, *args: count.update(["traces"]) or trace(self, *args))

    def traces(depth):
        model = timm.create_model("vit_tiny_patch16_224", depth=depth, img_size=32)
        count.clear()
        se_inject.inject(model)
        return count["traces"]

    assert traces(2) == traces(5) > 0


def test_nn_module_is_as_it_was_after_an_error():
    class Bad(nn.Module):
        def forward(self, x):
            raise ValueError("no")

    call, get = nn.Module.__call__, nn.Module.__getattr__
    for model in (nn.Sequential(Bad()), nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())):
        with pytest.raises((se_inject.SEInjectError, ZeroDivisionError)):
            se_inject.inject(model, filter_fn=lambda site: 1 / 0)
        assert (nn.Module.__call__, nn.Module.__getattr__) == (call, get)
        assert tracer._open is None


_aten = torch.ops.aten
_NO_PASS = {
    _aten.detach.default, _aten.as_strided.default, _aten.set_.source_Storage, _aten.set_.source_Storage_storage_offset}


class Passes(TorchDispatchMode):
    """Counts the bytes that operators read of tensors with values, and those of new ones that they make."""

    def __init__(self):
        super().__init__()
        self.copied = self.other = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        size = max((t.numel() * t.element_size() for t in tree_leaves((args, kwargs, out))
                    if isinstance(t, torch.Tensor) and not t.is_meta), default=0)
        if func is torch.ops.aten.copy_.default:
            self.copied += size if args[0] is not args[1] else 0
        elif not func.is_view and func not in _NO_PASS and not getattr(out, "is_meta", False):
            self.other += size
        return out


def _size(model):
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


def test_inject_passes_over_no_weights():
    model = timm.create_model("resnet50")
    before = _size(model)
    with Passes() as passes:
        se_inject.inject(model, stages=1)
    new = _size(model) - before
    assert new < before / 100
    assert passes.copied + passes.other < 20 * new


@pytest.fixture
def reads(monkeypatch):
    """How often each file is opened, and each tensor in it read."""
    count = Counter()
    real = safetensors.safe_open

    class Counted:
        def __init__(self, file, **kwargs):
            self.file, self.inner = str(file).rpartition("/")[2], real(file, **kwargs)

        def __enter__(self):
            count[self.file] += 1
            self.inner.__enter__()
            return self

        def __exit__(self, *error):
            return self.inner.__exit__(*error)

        def get_tensor(self, key):
            count[self.file, key] += 1
            return self.inner.get_tensor(key)

        def __getattr__(self, name):
            return getattr(self.inner, name)

    monkeypatch.setattr(safetensors, "safe_open", Counted)
    torch_load = torch.load
    monkeypatch.setattr(torch, "load", lambda file, **k: count.update([str(file).rpartition("/")[2]]) or torch_load(file, **k))
    return count


@pytest.fixture
def folder(tmp_path):
    model = randomise(timm.create_model("se_inject/resnet18", num_classes=10)).eval()
    se_inject.save(model, tmp_path / "full.safetensors")
    se_inject.save(model, tmp_path / "se.safetensors", only="se")
    se_inject.eject(model)
    torch.save({"state_dict": model.state_dict(), "arch": "resnet18"}, tmp_path / "base.pth")
    safetensors.torch.save_file(model.state_dict(), tmp_path / "base.safetensors")
    return tmp_path


@pytest.mark.parametrize(("files", "load"), [
    (["full"], lambda d, m: se_inject.load(d / "full.safetensors")),
    (["full"], lambda d, m: se_inject.load(d / "full.safetensors", model=m)),
    (["base"], lambda d, m: se_inject.load(d / "base.safetensors", model=m)),
    (["se", "base"], lambda d, m: se_inject.load(d / "se.safetensors", base=d / "base.safetensors")),
    (["base.pth"], lambda d, m: se_inject.load(d / "base.pth", model=m)),
    (["base.pth"], lambda d, m: se_inject.load(d / "base.pth")),
    (["full"], lambda d, m: command("eject", d / "full.safetensors", "-o", d / "o.safetensors")),
    (["base"], lambda d, m: command("inject", d / "base.safetensors", "--model", "resnet18", "-o", d / "o.safetensors")),
    (["base.pth"], lambda d, m: command("inject", d / "base.pth", "-o", d / "o.safetensors")),
    (["se", "base"], lambda d, m: command(
        "merge", d / "se.safetensors", "--base", d / "base.safetensors", "-o", d / "o.safetensors")),
    (["full"], lambda d, m: command("info", d / "full.safetensors")),
], ids=["built", "given", "base", "se", "given pth", "built pth", "eject", "inject", "inject pth", "merge", "info"])
def test_each_file_is_opened_once_and_no_tensor_read_twice(folder, reads, files, load):
    model = se_inject.inject(timm.create_model("resnet18", num_classes=10))
    load(folder, model)
    opened = {name: n for name, n in reads.items() if isinstance(name, str)}
    assert opened == {name if "." in name else f"{name}.safetensors": 1 for name in files}
    assert not reads or max(reads.values()) == 1


def command(*args):
    result = CliRunner().invoke(main, ["-q", *map(str, args)], catch_exceptions=False)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("name", ["full.safetensors", "base.safetensors", "base.pth"])
def test_load_passes_over_the_weights_once(folder, name):
    model = se_inject.inject(timm.create_model("resnet18", num_classes=10))
    with Passes() as passes:
        se_inject.load(folder / name, model=model)
    assert passes.copied <= _size(model)
    assert passes.other < _size(model) / 20


def test_blocks_alone_leave_the_base_where_it_is(folder):
    model = se_inject.inject(timm.create_model("resnet18", num_classes=10))
    blocks = sum(t.numel() * t.element_size() for t in safetensors.torch.load_file(folder / "se.safetensors").values())
    with Passes() as passes:
        se_inject.load(folder / "se.safetensors", model=model)
    assert passes.copied == blocks


def test_a_tensor_that_is_not_asked_for_takes_no_memory(folder):
    from se_inject.weights.reading import read_checkpoint

    torch.save({"state_dict": {"a": torch.ones(3)}, "optimizer": torch.zeros(1 << 20)}, folder / "train.pth")
    with Passes() as passes:
        found = read_checkpoint(folder / "train.pth")
    assert torch.equal(found.tensors["a"], torch.ones(3))
    assert passes.copied + passes.other == 0


def test_planning_a_skeleton_needs_no_values():
    with Passes() as passes:
        se_inject.inject(skeleton("resnet18"))
    assert passes.copied + passes.other < 1 << 20
