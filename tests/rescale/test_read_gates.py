"""What gates do on data: numbers by hooks, one pass, classes, and blocks that have no gate of channels."""

from __future__ import annotations

import json
import math
import re

import pytest
import timm
import torch
from torch import nn

import se_inject
from se_inject.blocks import catalogue
from se_inject.rescale.gate_statistics import ClassMeans, GateStatistics
from se_inject.surgery.state import block_paths

from ..support.checks import randomise
from ..support.versions import needs_coordinate_attention
from .test_fold import constant_gates, images, lived_in


def tiny(**options):
    return lived_in(se_inject.inject(randomise(timm.create_model("test_resnet")), **options)).eval()


def quotients(model, batches):
    """By block the gates (N, C) as its output over its input, whose positions are summed."""
    seen = {p: [] for p in block_paths(model)}
    handles = [
        model.get_submodule(p).register_forward_hook(
            lambda m, args, y, p=p: seen[p].append(y.double().sum((2, 3)) / args[0].double().sum((2, 3))))
        for p in seen]
    model.double()
    with torch.no_grad():
        for x in batches:
            model(x.double())
    model.float()
    for h in handles:
        h.remove()
    return {p: torch.cat(gates) for p, gates in seen.items()}


def close(found, expected):
    return torch.allclose(found, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("block", ["se", "ese", "eca", "ceca", "ecam", "gc"])
def test_numbers_are_those_of_hooks(block):
    model = tiny(block=block)
    x, labels = images(7, (3, 64, 64)), torch.tensor([3, 1, 3, -1, 8, 1, 3])
    expected = quotients(model, [x])
    report = se_inject.gates(model, [(x[:3], labels[:3]), [x[3:], labels[3:], "more"]])
    assert report.images == 7 and report.classes == (1, 3, 8) and report.class_images == (2, 3, 1) and not report.left_out
    assert [s.path for s in report.sites] == list(expected) and [s.stage for s in report.sites] == [1, 2, 3, 4]
    for s in report.sites:
        gates = expected[s.path]
        assert close(s.mean, gates.mean(0)) and close(s.deviation, gates.std(0, correction=0))
        variation = (gates.std(0, correction=0) / gates.mean(0).abs()).mean()
        assert s.variation == pytest.approx(float(variation), rel=1e-2, abs=1e-6)
        by_class = torch.stack([gates[labels == c].mean(0) for c in report.classes])
        assert close(s.class_means, by_class) and close(s.class_deviation, by_class.std(0, correction=0))


@pytest.mark.parametrize("name, size", [("vit_tiny_patch16_224", 224), ("convnext_atto", 32)])
def test_other_layouts(name, size):
    """Tokens, and maps with the channels last: the channels are those of the layer that makes the gate."""
    short = {"depth": 1} if name.startswith("vit") else {"depths": (1, 1, 1, 1)}
    model = constant_gates(se_inject.inject(timm.create_model(name, **short)))
    for s in se_inject.gates(model, [images(2, (3, size, size))]).sites:
        assert torch.allclose(s.mean, 2 * model.get_submodule(s.path).fc2.bias.double().sigmoid(), rtol=1e-6)
        assert s.variation < 1e-6 and s.class_deviation is None


def test_batches_of_any_size_give_the_numbers_of_one():
    model, x, labels = tiny(), images(6, (3, 32, 32)), torch.tensor([0, 1, 1, 0, 2, 0])
    whole = se_inject.gates(model, [(x, labels)])
    parts = se_inject.gates(model, iter([(x[i:j], labels[i:j]) for i, j in ((0, 1), (1, 1), (1, 4), (4, 6))]))
    assert parts.images == 6 and parts.classes == whole.classes and parts.class_images == whole.class_images
    for a, b in zip(parts.sites, whole.sites):
        for name in ("mean", "deviation", "class_means"):
            assert torch.allclose(getattr(a, name), getattr(b, name), rtol=1e-5, atol=1e-7)


def test_memory_does_not_grow_with_the_images():
    """What is kept after many batches has the size of what is kept after one."""
    statistics, means = GateStatistics(), ClassMeans()
    sizes = []
    for _ in range(3):
        gates = torch.rand(50, 8)
        statistics.add(gates)
        means.add(gates, torch.arange(50) % 4)
        kept = [t for o in (statistics, means) for t in vars(o).values() if isinstance(t, torch.Tensor)]
        sizes.append(sum(t.untyped_storage().nbytes() for t in kept))
    assert sizes[0] == sizes[1] == sizes[2] == (8 + 8 + 4 * 8 + 4) * 8


def test_small_deviations_are_not_lost():
    """Gates near 1 that differ in the seventh digit."""
    gates = 1 + torch.tensor([[0.0], [1.0], [2.0], [3.0]], dtype=torch.float64) * 1e-9
    statistics = GateStatistics()
    for g in gates:
        statistics.add(g[None])
    assert torch.allclose(statistics.deviation, gates.std(0, correction=0), rtol=1e-5)


def test_an_untrained_model_has_gates_of_one():
    report = se_inject.gates(se_inject.inject(timm.create_model("test_resnet")), [images(2)])
    assert all(torch.equal(s.mean, torch.ones_like(s.mean)) and not s.deviation.any() for s in report.sites)
    assert all(s.folds() and s.variation == 0 for s in report.sites)


def test_names_of_classes():
    model, x = tiny(stages=1), images(3)
    assert se_inject.gates(model, [(x, torch.tensor([2, 0, 2]))], class_names=["a", "b", "c"]).classes == ("a", "c")
    named = se_inject.gates(model, [(x, ("dog", "cat", "dog"))])
    assert named.classes == ("cat", "dog") and named.class_images == (1, 2)
    with pytest.raises(se_inject.SEInjectError, match="class 2, and class_names has 1 names"):
        se_inject.gates(model, [(x, torch.tensor([2, 0, 2]))], class_names=["a"])


def test_dicts_and_named_arguments():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = timm.create_model("test_resnet")

        def forward(self, pixel_values):
            return self.net(pixel_values)

    x = images(2)
    model = lived_in(se_inject.inject(Wrapper(), example_inputs={"pixel_values": x}))
    by_name = se_inject.gates(model, [{"pixel_values": x, "labels": torch.tensor([4, 5])}])
    assert by_name.classes == (4, 5) and by_name.images == 2
    assert torch.equal(by_name.sites[0].mean, se_inject.gates(model, [{"pixel_values": x}]).sites[0].mean)


@pytest.mark.parametrize("block, reason", [
    ("cbam", "not its input times a gate"), ("gca", "not its input times a gate"),
    ("ge", "branches on what its layers compute"),
    pytest.param("coord", "place to place|not its input", marks=needs_coordinate_attention)])
def test_blocks_without_a_gate_of_channels_are_named(block, reason):
    model = se_inject.inject(timm.create_model("test_resnet"), block=block)
    report = se_inject.gates(model, [images(2, (3, 64, 64))])
    assert not report.sites and list(report.left_out) == block_paths(model)
    assert all(re.search(reason, why) for why in report.left_out.values())
    assert str(report).count("left out: ") == 4 and str(report).endswith("the gates of 0 blocks on 2 images")


class Film(nn.Module):
    """A scale and a shift of each channel, from the mean of the map."""

    def __init__(self, channels):
        super().__init__()
        self.fc = nn.Conv2d(channels, 2 * channels, 1)

    def gate_and_shift(self, x):
        a, b = self.fc(x.mean((2, 3), keepdim=True)).chunk(2, 1)
        return 2 * torch.sigmoid(a), b

    def forward(self, x):
        gate, shift = self.gate_and_shift(x)
        return x * gate + shift


class Addcmul(Film):
    def forward(self, x):
        gate, shift = self.gate_and_shift(x)
        return torch.addcmul(shift, x, gate)


class Sub(Film):
    def forward(self, x):
        gate, shift = self.gate_and_shift(x)
        return gate.mul(x).sub(shift.expand_as(x), alpha=0.5)


class Residual(Film):
    def forward(self, x):
        gate, _ = self.gate_and_shift(x)
        return x * gate + x


class Doubled(Film):
    def forward(self, x):
        gate, shift = self.gate_and_shift(x)
        return torch.add(shift, x * gate, alpha=2)


class DoubledAddcmul(Film):
    def forward(self, x):
        gate, shift = self.gate_and_shift(x)
        return torch.addcmul(shift, x, gate, value=2)


class OfPlaces(Film):
    def forward(self, x):
        gate, _ = self.gate_and_shift(x)
        return x * gate + x.mean(1, keepdim=True)


def shifting(cls, monkeypatch):
    monkeypatch.setattr(catalogue, "_rows", {name: row for name, row in catalogue._rows.items() if name != "shifting"})
    se_inject.register_block("shifting", cls)
    torch.manual_seed(0)
    return se_inject.inject(randomise(timm.create_model("test_resnet")), block="shifting", init="timm").eval()


@pytest.mark.parametrize("cls", [Film, Addcmul, Sub])
def test_a_scale_with_a_shift_is_a_gate(cls, monkeypatch):
    model, x, seen = shifting(cls, monkeypatch), images(3, (3, 64, 64)), {}
    for p in block_paths(model):
        block = model.get_submodule(p)
        block.register_forward_pre_hook(lambda m, args, p=p: seen.update({p: m.gate_and_shift(args[0])[0].flatten(1)}))
    with torch.no_grad():
        model(x)
    report = se_inject.gates(model, [x])
    assert len(report.sites) == 4
    folded = se_inject.fold(shifting(cls, monkeypatch), [x]).sites
    for s, f in zip(report.sites, folded, strict=True):
        assert torch.allclose(s.mean.float(), seen[s.path].mean(0)) and s.folds() == f.folded and s.kept == f.reason
        assert s.variation == pytest.approx(f.variation) and f.folded == (cls is not Sub)
    model = shifting(cls, monkeypatch)
    with torch.no_grad():
        expected = model(x)
        assert (se_inject.optimize_for_inference(model)(x) - expected).norm() <= 1e-5 * expected.norm()


def test_the_gate_of_film():
    """The scale of the block, times its gain; `fold` sees the shift, too."""
    model, x, seen = tiny(block="film"), images(3, (3, 64, 64)), {}
    for p in block_paths(model):
        model.get_submodule(f"{p}.gate").register_forward_hook(lambda m, args, y, p=p: seen.update({p: 2 * y.flatten(1)}))
    with torch.no_grad():
        model(x)
    report = se_inject.gates(model, [x])
    assert len(report.sites) == 4 and all(torch.allclose(s.mean.float(), seen[s.path].mean(0)) for s in report.sites)
    limit = sorted(s.variation for s in report.sites)[1]
    folded = se_inject.fold(model, [x], max_variation=limit).sites
    assert [s.folds(limit) for s in report.sites] == [s.folded for s in folded] and sum(s.folded for s in folded) == 2


@pytest.mark.parametrize("cls, size", [
    (Residual, 32), (Residual, 64), (Doubled, 64), (DoubledAddcmul, 64), (OfPlaces, 64)])
def test_other_sums_are_no_shift(cls, size, monkeypatch):
    """At 32 the last map has one position, on which the block's input has the shape of a shift."""
    report = se_inject.gates(shifting(cls, monkeypatch), [images(2, (3, size, size))])
    assert not report.sites and len(report.left_out) == 4


def test_a_block_that_runs_twice_is_left_out():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = timm.create_model("test_resnet")

        def forward(self, x):
            return self.net(x) + self.net(-x)

    model = se_inject.inject(Twice(), input_size=(3, 32, 32))
    report = se_inject.gates(model, [images(2)], example_inputs=images(2))
    assert not report.sites and set(report.left_out.values()) == {"it gates 4 maps of 2 images"}


def test_what_fold_takes_is_what_fold_takes():
    model, x = tiny(), images(6, (3, 64, 64))
    report = se_inject.gates(model, [x])
    limit = sorted(s.variation for s in report.sites)[1]
    folded = se_inject.fold(model, [x], max_variation=limit)
    assert [s.folds(limit) for s in report.sites] == [s.folded for s in folded.sites]
    assert sum(s.folded for s in folded.sites) == 2
    assert [s.variation for s in report.sites] == pytest.approx([s.variation for s in folded.sites])


def test_the_model_is_left_as_it_was():
    model = tiny().train()
    model.layer2.eval()
    model.layer1.register_forward_hook(lambda m, args, y: None)
    model(images(2)).sum().backward()
    state = {k: t.clone() for k, t in model.state_dict().items()}
    grads = {k: (p.grad, p.grad.clone()) for k, p in model.named_parameters()}
    before = [(m.training, type(m), dict(m._forward_hooks), dict(m._forward_pre_hooks), set(vars(m))) for m in model.modules()]
    drawn = torch.get_rng_state()
    se_inject.gates(model, [images(2)])
    with pytest.raises(se_inject.SEInjectError):
        se_inject.gates(model, [images(2), torch.zeros(1)])
    assert before == [
        (m.training, type(m), dict(m._forward_hooks), dict(m._forward_pre_hooks), set(vars(m))) for m in model.modules()]
    assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())
    assert all(p.grad is grads[k][0] and torch.equal(p.grad, grads[k][1]) for k, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.parametrize("loader, message", [
    ([], r"gates\(ResNet\w*, loader\): the loader gave no batch"),
    ([torch.zeros(0, 3, 32, 32)], "the loader gave no batch"),
    (3, "the loader is a int: pass a DataLoader or a list"),
    ([torch.zeros(2, 32)], r"gave a tensor of \(2, 32\) and torch.float32"),
    ([torch.zeros(2, 3, 32, 32, dtype=torch.uint8)], "floating-point images"),
    (["a.png"], "the loader gave a str"),
    ([torch.zeros(2, 5, 32, 32)], "does not take the loader's images"),
    ([images(2), images(2, (5, 32, 32))], r"gates\(ResNet\w*\): the model does not take the batch"),
    ([(images(2), torch.zeros(2, 10))], r"a tensor of \(2, 10\) and torch.float32 as labels of 2 images"),
    ([(images(2), torch.tensor([1]))], r"a tensor of \(1,\) and torch.int64 as labels of 2 images"),
    ([(images(2), [{}, {}])], "a list as labels of 2 images; it must give one class number or name for each image"),
    ([images(2) * math.nan], "is NaN or infinite"),
])  # fmt: skip
def test_wrong_loaders(loader, message):
    with pytest.raises(se_inject.SEInjectError, match=message):
        se_inject.gates(tiny(), loader)


def test_wrong_models():
    with pytest.raises(se_inject.SEInjectError, match="no injected blocks"):
        se_inject.gates(timm.create_model("test_resnet"), [images(2)])
    with pytest.raises(se_inject.SEInjectError, match="needs a model"):
        se_inject.gates("resnet18", [images(2)])


def test_the_table_and_the_dict_say_the_same():
    model, x = tiny(), images(4, (3, 64, 64))
    report = se_inject.gates(model, [(x, torch.tensor([0, 1, 0, 1]))], class_names=["cat", "dog"])
    head, *rows, last = str(report).splitlines()
    assert head.split("  ")[0] == "site" and last == "the gates of 4 blocks on 4 images of 2 classes"
    said = json.loads(json.dumps(report.to_dict()))
    assert said["classes"] == ["cat", "dog"] and said["class_images"] == [2, 2] and said["images"] == 4
    for row, s, d in zip(rows, report.sites, said["sites"], strict=True):
        values = (s.mean.mean(), s.mean.min(), s.mean.max(), s.deviation.mean(), s.class_deviation.mean())
        assert row.split() == [s.path, str(len(s.mean)), *(f"{float(v):.4f}" for v in values), "takes", "it"]
        assert d["path"] == s.path and d["mean"] == s.mean.tolist() and d["class_means"] == s.class_means.tolist()
    alone = se_inject.gates(model, [x])
    assert str(alone).splitlines()[1].split()[6] == "-" and str(alone).endswith("4 blocks on 4 images")
