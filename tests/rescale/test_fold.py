"""Gates folded into weights: only rounding if they are constant; otherwise a report says what they do."""

import copy
import dataclasses
import math
import pickle
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import se_inject
from se_inject.blocks import catalogue
from se_inject.capture.inputs import smallest_input
from se_inject.surgery.state import block_paths, injections_of

from ..support.checks import randomise, total
from ..support.tiers import contract
from ..support.versions import needs_coordinate_attention, needs_intermediates, needs_local_dir, needs_model_args

# name, its blocks that cannot be folded
FAMILIES = [
    ("resnet18", 0), ("mobilenetv2_050", 0), ("convnext_atto", 0), ("vit_tiny_patch16_224", 0), ("nf_resnet26", 0),
    ("densenet121", 0), ("efficientnet_lite0", 0), ("poolformer_s12", 0), ("levit_128s", 0),
    ("xcit_nano_12_p8_224", 2),  # the class token is added to something else
    ("mixer_s32_224", 8),  # a linear layer over tokens has the channels on its other axis
    *contract(("regnetx_002", 0), ("dla34", 0), ("res2net50_26w_4s", 0), ("hrnet_w18_small", 0), ("coat_lite_tiny", 0)),
]  # fmt: skip
SHORT = {
    "convnext_atto": {"depths": (1, 1, 1, 1)}, "vit_tiny_patch16_224": {"depth": 2}, "nf_resnet26": {"depths": (1, 1, 1, 1)},
    "densenet121": {"block_config": (2, 2, 2, 2)}, "levit_128s": {"depth": (1, 1, 1)},
    "res2net50_26w_4s": {"layers": (2, 1, 1, 1)}, "coat_lite_tiny": {"serial_depths": (1, 1, 1, 1)}}


def constant_gates(model, low=0.4):
    """Give every block a gate that differs from channel to channel, and is the same for all images."""
    generator = torch.Generator().manual_seed(2)
    for path in block_paths(model):
        for name, m in model.get_submodule(path).named_children():
            if name in ("fc2", "conv_expand"):
                nn.init.zeros_(m.weight)
                m.bias.data.copy_(torch.rand(m.bias.shape, generator=generator) * 2 - low)
    return model


def lived_in(model):
    """Give the blocks weights as after training."""
    generator = torch.Generator().manual_seed(3)
    for path in block_paths(model):
        for p in model.get_submodule(path).parameters():
            p.data.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


def images(n=4, size=(3, 32, 32), seed=4):
    return torch.randn(n, *size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name, kept", FAMILIES)
def test_constant_gates_fold_away(name, kept):
    model = randomise(timm.create_model(name, **SHORT.get(name, {}))).eval()
    keys, classes = list(model.state_dict()), [type(m) for m in model.modules()]
    constant_gates(se_inject.inject(model))
    x = images(2, smallest_input(model))
    with torch.no_grad():
        expected = total(model(x))
    report = se_inject.fold(model, [x])
    with torch.no_grad():
        assert (total(model(x)) - expected).norm() <= 1e-5 * expected.norm()
    assert report.change < 1e-5 and report.agreement == 1.0 and report.images == 2
    assert len(report.kept) == kept and all(s.reason for s in report.kept) and all(s.into for s in report.folded)
    assert all(s.variation < 1e-6 for s in report.sites)
    if not kept:
        assert list(model.state_dict()) == keys and [type(m) for m in model.modules()] == classes
        base = timm.create_model(name, **SHORT.get(name, {})).eval()
        base.load_state_dict(model.state_dict(), strict=True)
        with torch.no_grad():
            assert torch.equal(total(base(x)), total(model(x)))


@pytest.mark.parametrize("block", ["se", "ese", "eca", "ceca", "ecam", "gc"])
def test_gates_by_the_formula(block):
    """The reported mean and variation are those of the quotient of output and input, computed here."""
    model = lived_in(se_inject.inject(randomise(timm.create_model("test_resnet")), block=block)).eval()
    seen = {p: [] for p in block_paths(model)}
    handles = [
        model.get_submodule(p).register_forward_hook(
            lambda m, args, y, p=p: seen[p].append((y.double().sum((2, 3)), args[0].double().sum((2, 3)))))
        for p in seen]
    batches = [images(3, (3, 64, 64)), (images(2, (3, 64, 64), 5), torch.zeros(2)), images(1, (3, 64, 64), 6)]
    model.double()
    with torch.no_grad():
        for b in batches:
            model((b[0] if isinstance(b, tuple) else b).double())
    for h in handles:
        h.remove()
    model.float()
    report = se_inject.fold(model, batches)
    assert report.images == 6 and len(report.folded) == 4
    for s in report.sites:
        gates = torch.cat([y / x for y, x in seen[s.path]])
        variation = (gates.std(0, correction=0) / gates.mean(0).abs()).mean()
        assert s.gate == pytest.approx(float(gates.mean()), rel=1e-3)
        assert s.variation == pytest.approx(float(variation), rel=1e-2, abs=1e-6)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "vit_tiny_patch16_224", "nf_resnet26", "levit_128s"])
def test_constant_shifts_go_into_biases(name):
    """Images that are all the same have one gate and one shift."""
    model = randomise(timm.create_model(name, **SHORT.get(name, {}))).eval()
    keys = list(model.state_dict())
    constant_gates(lived_in(se_inject.inject(model, block="film")))
    for path in block_paths(model):
        nn.init.normal_(model.get_submodule(path).shift.bias, std=5.0)
    x = images(1, smallest_input(model))
    with torch.no_grad():
        expected = total(model(x))
        for path in block_paths(model):  # the shifts count
            model.get_submodule(path).shift.bias.neg_()
        assert (total(model(x)) - expected).norm() > 1e-3 * expected.norm()
        for path in block_paths(model):
            model.get_submodule(path).shift.bias.neg_()
    report = se_inject.fold(model, [x.expand(2, -1, -1, -1)], max_variation=1e-5)
    assert not report.kept and all(s.into[-1].rpartition(".")[2] in ("bias", "beta") for s in report.sites)
    base = timm.create_model(name, **SHORT.get(name, {})).eval()
    assert list(model.state_dict()) == keys
    base.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        assert (total(base(x)) - expected).norm() <= 1e-5 * expected.norm()


def test_shifts_by_the_formula():
    """The variation is that of the shift, computed here, and a fold adds the mean shift."""
    model = se_inject.inject(randomise(timm.create_model("test_resnet")), block="film", stages=1).eval()
    block, seen = model.layer1[0].se, []
    nn.init.normal_(block.shift.bias, std=5.0)
    block.register_forward_hook(lambda m, args, y: seen.append((y - args[0]).double().mean((2, 3))))
    x = images(6, (3, 64, 64)) * torch.tensor([0.5, 1, 1.5, 2, 2.5, 3]).view(6, 1, 1, 1)
    bias, copied = model.layer1[0].bn2.bias.detach().clone(), copy.deepcopy(model)
    with torch.no_grad():
        model(x)
    shifts = seen[0]
    kept = se_inject.fold(copied, [x], max_variation=0.01).kept
    assert len(kept) == 1 and kept[0].reason.startswith("its gate or shift varies by 0.")
    (site,) = se_inject.fold(model, [x[:2], x[2:]]).folded
    variation = shifts.std(0, correction=0).mean() / shifts.mean(0).abs().mean()
    assert site.variation == pytest.approx(float(variation), rel=1e-3) and site.gate == 1.0
    assert torch.allclose(model.layer1[0].bn2.bias.double(), bias + shifts.mean(0), atol=1e-5)


def test_new_blocks_with_a_shift_leave_the_base_as_it_is():
    model = randomise(timm.create_model("test_resnet")).eval()
    before = copy.deepcopy(model.state_dict())
    assert not se_inject.fold(se_inject.inject(model, block="film"), [images(2, (3, 64, 64))]).kept
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


@pytest.mark.parametrize("name, reason", [
    ("efficientnet_lite0", "goes into the bias of the layer before it: it does not pass hardtanh"),
    ("densenet121", "needs a bias, and conv2d before it has none")])
def test_shifts_that_no_bias_takes_in_are_kept(name, reason):
    model = se_inject.inject(timm.create_model(name, **SHORT.get(name, {})), block="film", stages=(2, 3)).eval()
    state = copy.deepcopy(model.state_dict())
    report = se_inject.fold(model, [images(size=(3, 64, 64))])
    assert report.kept and not report.folded and all(reason in s.reason for s in report.sites)
    assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())


@pytest.mark.parametrize("block, reason", [
    ("cbam", "not its input times a gate"), ("gca", "not its input times a gate"),
    ("ge", "branches on what its layers compute"),
    pytest.param("coord", "place to place|not its input", marks=needs_coordinate_attention)])
def test_gates_that_are_not_of_channels_are_kept(block, reason):
    model = se_inject.inject(timm.create_model("resnet18"), block=block).eval()
    state, classes = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    report = se_inject.fold(model, [images(size=(3, 64, 64))])
    assert not report.folded and all(re.search(reason, s.reason) and math.isnan(s.variation) for s in report.sites)
    assert report.change == 0.0
    assert "nan" not in str(report) and re.search(r"layer1.0.\w+ +- +-  kept: ", str(report))
    assert [type(m) for m in model.modules()] == classes
    assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())


@needs_model_args
def test_some_blocks_are_folded_and_the_rest_saves_and_loads(tmp_path):
    model = lived_in(se_inject.inject(timm.create_model("vit_tiny_patch16_224", img_size=32)))  # two blocks in an owner
    model.eval().blocks[0].train()
    trial = se_inject.fold(copy.deepcopy(model), [images()])
    limit = sorted(s.variation for s in trial.sites)[9]
    report = se_inject.fold(model, [images()], max_variation=limit)
    assert {s.path for s in report.folded} == {s.path for s in trial.sites if s.variation <= limit}
    assert len(report.folded) == 10 and all("varies by" in s.reason for s in report.kept)
    left = [s.path for s in report.kept]
    assert sorted(block_paths(model)) == sorted(left)
    assert str(report).splitlines()[-1].startswith("10 of 24 blocks folded; on 4 images")
    assert model.blocks[0].training and not model.blocks[1].training
    model.eval()
    se_inject.save(model, tmp_path / "m.safetensors")
    with torch.no_grad():
        y = model(images())
        for other in (se_inject.load(tmp_path / "m.safetensors"), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert list(other.state_dict()) == list(model.state_dict())
            assert torch.equal(other.eval()(images()), y)
    again = se_inject.fold(model, [images()])
    assert len(again.folded) == 14 and list(model.state_dict()) == list(
        timm.create_model("vit_tiny_patch16_224", img_size=32).state_dict())


@needs_intermediates
def test_a_sequential_keeps_its_positions_when_some_blocks_are_folded():
    model = constant_gates(se_inject.inject(timm.create_model("vgg11", mlp_ratio=0.02))).eval()
    for path in block_paths(model)[:3]:
        nn.init.normal_(model.get_submodule(path).fc2.weight)
    length, x = len(model.features), images(size=(3, 64, 64))
    report = se_inject.fold(model, [x], max_variation=1e-6)
    assert block_paths(model) == [s.path for s in report.sites[:3]] and len(model.features) == length
    with torch.no_grad():
        features, _ = model.forward_intermediates(x)
        assert torch.equal(features, model.forward_features(x))


def test_folded_blocks_do_not_come_back_from_another_injection(tmp_path):
    model = se_inject.inject(randomise(timm.create_model("resnet18")), stages=(1,))
    lived_in(se_inject.inject(model, block="eca")).eval()
    variation = {s.path: s.variation for s in se_inject.fold(copy.deepcopy(model), [images()]).sites}
    report = se_inject.fold(model, [images()], max_variation=sorted(variation.values())[3])
    assert len(report.folded) == 4
    se_inject.save(model, tmp_path / "m.safetensors")
    other = se_inject.load(tmp_path / "m.safetensors")
    assert list(other.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(images()), model(images()))


@needs_local_dir
def test_timm_saves_the_model_as_it_is_now(tmp_path):
    """timm reads the folder that it writes, for partly folded, folded and ejected models."""
    model = lived_in(randomise(timm.create_model("se_inject/resnet18", num_classes=3, se_stages=(3, 4)))).eval()
    ejected, folded = se_inject.eject(copy.deepcopy(model)), copy.deepcopy(model)
    variation = [s.variation for s in se_inject.fold(folded, [images()]).sites]
    se_inject.fold(model, [images()], max_variation=sorted(variation)[1])
    assert len(block_paths(model)) == 2
    for i, (m, name) in enumerate([(ejected, "resnet18"), (folded, "resnet18"), (model, "se_inject/resnet18")]):
        assert m.pretrained_cfg["architecture"] == name
        timm.models._hub.save_for_hf(m, tmp_path / str(i), safe_serialization=True)
        other = timm.create_model(f"local-dir:{tmp_path / str(i)}", pretrained=True).eval()
        assert list(other.state_dict()) == list(m.state_dict())
        with torch.no_grad():
            assert torch.equal(other(images()), m(images()))


@needs_intermediates
@pytest.mark.parametrize("name, include, kept", [
    ("resnet18", ("layer4.*",), ["layer4.1.se1"]), ("mobilenetv2_050", ("blocks.0.*", "blocks.1.*"), ["blocks.1.1.se1"])])
def test_gates_that_other_methods_would_lose_are_kept(name, include, kept):
    """The gate behind the last layer of a stage could go into the next stage or the classifier, but for the features."""
    model = constant_gates(se_inject.inject(randomise(timm.create_model(name)), placement="post", include=include)).eval()

    def outputs():
        with torch.no_grad():
            return [total(f(images(2))) for f in (model, model.forward_features, model.forward_intermediates)]

    expected = outputs()
    report = se_inject.fold(model, [images(2)])
    assert [s.path for s in report.kept] == block_paths(model) == kept and report.folded
    assert "returns would be without its gate, which goes into" in report.kept[0].reason
    for a, b in zip(expected, outputs(), strict=True):
        assert (a - b).norm() <= 1e-4 * a.norm()


def test_an_owner_that_was_parametrized_is_refused():
    model = se_inject.inject(Net(), input_size=(3, 32, 32)).eval()
    model.block.register_parameter("gain", nn.Parameter(torch.ones(())))
    nn.utils.parametrize.register_parametrization(model.block, "gain", nn.Identity())
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(se_inject.SEInjectError, match="fold: ParametrizedResidual was changed since"):
        se_inject.fold(model, [images()])
    assert list(model.state_dict()) == list(state) and block_paths(model)


def test_layers_in_the_memory_of_others():
    """Tied by their data, a layer stays as it is; parts of one vector that do not overlap are scaled."""
    model = timm.create_model("resnet18")
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector, model.parameters())
    model.layer1[1].bn2.weight = nn.Parameter(model.layer1[0].bn2.weight.data)
    model.layer2[1].bn2.bias = nn.Parameter(vector.data[3:131])
    report = se_inject.fold(constant_gates(se_inject.inject(model)).eval(), [images()])
    assert {s.path: s.folded for s in report.sites} == {f"layer{i}.{j}.se": (i > 2 or (i, j) == (2, 0)) for i in range(1, 5)
                                                        for j in range(2)}
    assert all("is shared with another module" in s.reason for s in report.kept)


def test_a_model_of_inference_mode():
    with torch.inference_mode():
        model = constant_gates(se_inject.inject(randomise(Net()), input_size=(3, 32, 32))).eval()
    with pytest.raises(se_inject.SEInjectError, match="call fold inside"):
        se_inject.fold(model, [images()])
    with torch.inference_mode():
        assert len(se_inject.fold(model, [images()]).folded) == 1


class Counting(list):
    """A loader that gives other images in its second pass."""

    rounds = 0

    def __iter__(self):
        self.rounds += 1
        return iter([images(seed=self.rounds)])


def test_a_loader_may_shuffle():
    model = lived_in(se_inject.inject(randomise(timm.create_model("resnet18")))).eval()
    report = se_inject.fold(model, Counting())
    assert 0 < report.change < 1


@pytest.mark.parametrize("loader, message", [
    ([], "no batch"), (iter([images()]), "an iterator"), ([torch.zeros(3, 32, 32)], "batches of floating-point images"),
    ([{"image": images()}], "gave a dict"), ([images() * math.nan], "NaN"), ([images().byte()], "floating-point"),
    ([images(size=(1, 32, 32))], "does not take"), ([images(), "x"], "gave a str"),
    ([images(), images(size=(1, 32, 32))], "does not take the batch of an input of shape"),
    ([images().double()], "does not take the batch"),
], ids=["empty", "iterator", "dims", "dict", "nan", "bytes", "channels", "late", "later", "double"])
def test_wrong_loaders_change_nothing(loader, message):
    model = se_inject.inject(timm.create_model("resnet18"))
    model.layer1.eval()
    state = {k: t.clone() for k, t in model.state_dict().items()}
    classes, modes = [type(m) for m in model.modules()], [m.training for m in model.modules()]
    with pytest.raises(se_inject.SEInjectError, match=message):
        se_inject.fold(model, loader)
    assert [type(m) for m in model.modules()] == classes and [m.training for m in model.modules()] == modes
    after = model.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[k], state[k]) for k in state)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_an_error_late_undoes_everything(monkeypatch):
    model = lived_in(se_inject.inject(timm.create_model("resnet18"))).eval()
    state = {k: t.clone() for k, t in model.state_dict().items()}
    with torch.no_grad():
        y = model(images())
    monkeypatch.setattr("se_inject.rescale.fold.compare", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        se_inject.fold(model, [images()])
    with torch.no_grad():
        assert torch.equal(model(images()), y)
    assert list(model.state_dict()) == list(state)
    assert len(injections_of(model)) == 1


def test_a_wrong_fold_is_refused(monkeypatch):
    model = lived_in(se_inject.inject(randomise(timm.create_model("resnet18")))).eval()
    state = {k: t.clone() for k, t in model.state_dict().items()}
    monkeypatch.setattr("se_inject.rescale.absorb.Scaling.scale", lambda self, values, factors: values * 1.5)
    with pytest.raises(se_inject.SEInjectError, match="do not do what the mean gates do"):
        se_inject.fold(model, [images()])
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items())


def test_wrong_options():
    with pytest.raises(se_inject.SEInjectError, match="max_variation='much'"):
        se_inject.fold(se_inject.inject(timm.create_model("resnet18")), [images()], max_variation="much")


def injected():
    return se_inject.inject(timm.create_model("test_resnet")).eval()


@pytest.mark.parametrize("function", [lambda m: se_inject.fold(m, [images()]), se_inject.to_native], ids=["fold", "to_native"])
@pytest.mark.parametrize("make, message", [
    (lambda: "resnet18", "needs a model"),
    (lambda: timm.create_model("test_resnet"), "no injected blocks"),
    (lambda: nn.Sequential(injected()), r"its module '0' is the injected model: \w+\(model.get_submodule\('0'\)\)"),
    (lambda: nn.DataParallel(injected()), "wrapped by DataParallel"),
    (lambda: torch.compile(injected()), "is compiled"),
    (lambda: se_inject.optimize_for_inference(injected()), "optimized for inference"),
    (lambda: injected().to("meta"), "no values"),
], ids=["name", "base", "inside", "wrapped", "compiled", "optimized", "meta"])
def test_models_that_are_refused(function, make, message):
    with pytest.raises(se_inject.SEInjectError, match=message):
        function(make())


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        return x + self.bn(self.conv(x.relu()))


class Net(nn.Module):
    """A small classifier, and what it returns as a function of its logits."""

    def __init__(self, returned=lambda z: z):
        super().__init__()
        self.stem, self.block, self.fc, self.returned = nn.Conv2d(3, 8, 3), Residual(), nn.Linear(8, 5), returned

    def forward(self, x):
        return self.returned(self.fc(self.block(self.stem(x)).mean((2, 3))))


@dataclasses.dataclass
class Logits:
    logits: torch.Tensor


@pytest.mark.parametrize("returned", [
    lambda z: (z, z.argmax(1)), lambda z: {"probable": z > z.mean(), "logits": [z, None, 3, "text"]},
    lambda z: torch.fft.fft(z), lambda z: F.dropout(z, 0.5, training=True), lambda z: z * torch.rand_like(z),
], ids=["class", "nested", "complex", "dropout", "noise"])
def test_outputs_that_are_compared(returned):
    model = constant_gates(se_inject.inject(randomise(Net(returned)), input_size=(3, 32, 32)).eval())
    assert block_paths(model) == ["block.se"]
    report = se_inject.fold(model, [images()])
    assert len(report.folded) == 1 and report.change < 1e-5


def test_a_model_that_amplifies_rounding_is_proven_in_double_precision():
    model = constant_gates(se_inject.inject(randomise(Net(lambda z: (z * 3e5).sin())), input_size=(3, 32, 32)).eval())
    report = se_inject.fold(model, [images()])
    assert len(report.folded) == 1 and report.change > torch.finfo(torch.float32).eps ** 0.5


@pytest.mark.parametrize("returned, what", [
    (Logits, "an object of class Logits"), (lambda z: 1, "no tensor"), (lambda z: (z, Logits(z)), "an object of class Logits"),
], ids=["object", "number", "both"])
def test_outputs_that_cannot_be_compared_are_refused(returned, what):
    model = constant_gates(se_inject.inject(randomise(Net()), input_size=(3, 32, 32)).eval())
    model.returned = returned
    state = {k: t.clone() for k, t in model.state_dict().items()}
    with pytest.raises(se_inject.SEInjectError, match=f"the model returns {what}"):
        se_inject.fold(model, [images()])
    assert all(torch.equal(t, state[k]) for k, t in model.state_dict().items()) and block_paths(model)


class OfRows(nn.Module):
    """A gate for each row of the map."""

    def __init__(self, channels):
        super().__init__()
        self.fc, self.gate = nn.Conv1d(channels, 1, 1), nn.Sigmoid()

    def forward(self, x):
        return x * self.gate(self.fc(x.mean(3))).unsqueeze(-1)


class OfGroups(OfRows):
    """One gate for the channels of the same place in each of two groups."""

    def __init__(self, channels):
        super().__init__(channels)
        self.fc = nn.Conv2d(channels // 2, channels // 2, 1)

    def forward(self, x):
        y = x.view(-1, x.shape[1] // 2, x.shape[2], x.shape[3])
        return (y * self.gate(self.fc(y.mean((2, 3), keepdim=True)))).view(x.shape)


class Flipped(OfRows):
    """A gate for each channel, of the map with its channels in the opposite order."""

    def __init__(self, channels):
        super().__init__(channels)
        self.fc = nn.Conv2d(channels, channels, 1)

    def of(self, x):
        return self.gate(self.fc(x.mean((2, 3), keepdim=True)))

    def forward(self, x):
        return (x.permute(0, 2, 3, 1) * self.of(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class InPlace(Flipped):
    def forward(self, x):
        return x.mul_(self.of(x))


class ByKeyword(nn.Module):
    """A block whose product is in a module inside, which is called by keyword."""

    def __init__(self, channels):
        super().__init__()
        self.core = Flipped(channels)

    def forward(self, x):
        return self.core(x=x)


def own_block(cls, monkeypatch, size=(3, 10, 10), **zero):
    monkeypatch.setattr(catalogue, "_rows", {name: row for name, row in catalogue._rows.items() if name != "own"})
    se_inject.register_block("own", cls)
    return se_inject.inject(randomise(Net()), input_size=size, block="own", init="timm").eval()


@pytest.mark.parametrize("cls", [OfRows, OfGroups])
@pytest.mark.parametrize("side", [6, 10, 12])
def test_gates_of_something_else_than_channels_are_kept(cls, side, monkeypatch):
    """The map has 8 channels, and fewer rows, as many rows, or more."""
    model = own_block(cls, monkeypatch, (3, side, side))
    report = se_inject.fold(model, [images(2, (3, side, side))])
    assert [s.reason for s in report.sites] == ["its gate is not one factor for each channel"]
    assert list(se_inject.gates(model, [images(2, (3, side, side))]).left_out) == ["block.se"]


@pytest.mark.parametrize("cls", [Flipped, InPlace, ByKeyword])
def test_blocks_of_another_form_are_folded(cls, monkeypatch):
    model, x = own_block(cls, monkeypatch), images(1, (3, 10, 10))
    with torch.no_grad():
        expected = model(x)
    assert len(se_inject.fold(model, [x]).folded) == 1 and not block_paths(model)
    with torch.no_grad():
        assert (model(x) - expected).norm() <= 1e-5 * expected.norm()
