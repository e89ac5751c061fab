"""Models that are not timm's: written by hand, torchvision's, and fx GraphModules; forwards that branch on sizes."""

import copy
import io
import pickle
import random

import pytest
import timm
import torch
import torchvision
from timm.layers import DropPath
from torch import fx, nn
from torchvision.models.feature_extraction import create_feature_extractor

import se_inject
from se_inject.blocks.squeeze_excite import SqueezeExcite
from se_inject.surgery.state import block_paths

from ..support.checks import check_identity, randomise


def conv(i: int, o: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())


class Unit(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv(16, 16), conv(16, 16)

    def forward(self, x):
        return torch.relu(self.b(self.a(x)) + x)


class Net(nn.Module):
    """No config, no feature info: the stem says the channels, and CIFAR's or ImageNet's size is tried."""

    def __init__(self, *units: nn.Module):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.units = nn.Sequential(*units)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.units(self.stem(x)).mean((2, 3)))


def test_a_plain_residual_network():
    check_identity(Net(Unit(), Unit()), (3, 16, 16))
    assert block_paths(se_inject.inject(Net(Unit(), Unit()))) == ["units.0.se", "units.1.se"]


@pytest.mark.parametrize("make", [
    lambda: fx.symbolic_trace(Net(Unit(), Unit()).eval()),
    lambda: create_feature_extractor(torchvision.models.resnet18(), ["layer2", "layer4"]),
    lambda: timm.create_model("resnet18", features_only=True, feature_cls="fx"),
])
def test_a_graph_module_is_rewritten_in_its_own_graph(make):
    torch.manual_seed(0)
    model = make().eval()
    size = (3, 64, 64)
    x = torch.randn(2, *size)

    def outputs(m):
        with torch.no_grad():
            y = m(x)
        return [y] if isinstance(y, torch.Tensor) else list(y.values() if isinstance(y, dict) else y)

    def code():
        return [m.code for m in model.modules() if isinstance(m, fx.GraphModule)]

    before, keys, was = outputs(model), list(model.state_dict()), code()
    assert was
    plan = se_inject.plan(model, input_size=size)
    assert len(plan.sites) in (2, 8) and all("+" in s.drawing for s in plan.sites)
    se_inject.inject(model, input_size=size)
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(model), strict=True))
    assert sum(isinstance(m, SqueezeExcite) for m in model.modules()) == len(plan.sites)
    twin = copy.deepcopy(model)
    for m in twin.modules():
        if isinstance(m, SqueezeExcite):
            m.gain = 0.0  # the gates are called
    assert not torch.equal(before[-1], outputs(twin)[-1])
    model.train()
    model.eval()
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(model), strict=True))
    se_inject.eject(model)
    assert list(model.state_dict()) == keys and code() == was
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(model), strict=True))


class Branching(nn.Module):
    """Pads where the size is no multiple of the window, as window attention does."""

    def __init__(self):
        super().__init__()
        self.window = 4
        self.work = conv(16, 16)
        self.drop_path = DropPath(0.5)

    def forward(self, x):
        assert x.shape[1] == 16, "wrong width"
        h, w = x.shape[2:]
        pad_h, pad_w = -h % self.window, -w % self.window
        y = x
        if pad_h > 0 or pad_w > 0:
            y = nn.functional.pad(y, (0, pad_w, 0, pad_h))
        y = self.work(y)
        if pad_h > 0 or pad_w > 0:
            y = y[:, :, :h, :w].contiguous()
        return x + self.drop_path(y)


@pytest.mark.parametrize("side", [18, 20])  # the unit sees 16 or 18: without and with padding
def test_a_forward_that_branches_on_sizes(side):
    model = Net(Branching())
    check_identity(model, (3, side, side))
    base = copy.deepcopy(model).eval()
    se_inject.inject(model.eval(), input_size=(3, side, side))
    for other in (18, 20, 23):
        x = torch.randn(2, 3, other, other)
        with torch.no_grad():
            assert torch.equal(model(x), base(x))
    calls = []
    handle = model.units[0].se.register_forward_hook(lambda *a: calls.append(1))
    model(torch.randn(2, 3, 18, 18))
    model(torch.randn(2, 3, 20, 20))
    handle.remove()
    assert len(calls) == 2
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    x = torch.randn(2, 3, 23, 23)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    with pytest.raises(se_inject.SEInjectError, match="wrong width"):
        model.units[0](torch.randn(1, 8, 16, 16))


class OnValues(Unit):
    def forward(self, x):
        y = self.b(self.a(x))
        return x + y if y.sum() > 0 else x - y


def test_a_forward_that_branches_on_values_is_refused():
    model = Net(Unit(), OnValues())
    with pytest.raises(se_inject.SEInjectError):
        se_inject.plan(model, input_size=(3, 16, 16))  # it cannot run without values
    assert type(model.units[1]) is OnValues


@pytest.mark.parametrize("name, sizes", [
    ("swin_tiny_patch4_window7_224", [({"img_size": 448, "window_size": 7}, 448), ({"img_size": 256, "window_size": 8}, 256)]),
    ("swinv2_cr_tiny_ns_224", [({"img_size": (288, 288)}, 288)]),
    ("vit_tiny_patch16_224", [({"img_size": 160}, 160)]),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore::UserWarning:timm")
def test_attributes_that_are_set_later_are_seen(name, sizes):
    """A trace holds what an attribute was; one that is set makes it be traced anew."""
    base = randomise(timm.create_model(name)).eval()
    model = se_inject.inject(copy.deepcopy(base))
    classes = [type(m) for m in base.modules()]
    for kwargs, side in sizes:
        x = torch.randn(1, 3, side, side)
        for m in (base, model):
            m.set_input_size(**kwargs)
        stale = copy.deepcopy(model)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        with torch.no_grad():
            expected = base(x)
            for m in (model, stale, torch.load(buffer, weights_only=False)):
                assert torch.equal(m(x), expected)
    se_inject.eject(model)
    assert [type(m) for m in model.modules()] == classes


class Flagged(Unit):
    def __init__(self):
        super().__init__()
        self.skip = True
        self.alone = None

    def forward(self, x):
        y = self.b(self.a(x))
        if self.alone is not None:
            return self.alone(x)
        return x + y if self.skip else y


def test_a_flag_that_is_set_later():
    model = se_inject.inject(Net(Flagged()).eval(), input_size=(3, 16, 16))
    base = Net(Flagged()).eval()
    base.load_state_dict({k: t for k, t in model.state_dict().items() if ".se." not in k})
    x = torch.randn(1, 3, 16, 16)
    for m in (model, base):
        m.units[0].skip = False
    with torch.no_grad():
        assert torch.equal(model(x), base(x))
    calls = []
    model.units[0].se.register_forward_hook(lambda *a: calls.append(1))
    model(x)
    assert calls == [1]
    model.units[0].alone = nn.Identity()  # the branch goes nowhere now, and the block with it
    base.units[0].alone = nn.Identity()
    with torch.no_grad():
        assert torch.equal(model(x), base(x))


def test_another_way_in_does_not_miss_the_block():
    """XceptionModule is also called by forward_with_tap, where features are taken."""
    base = randomise(timm.create_model("xception41")).eval()
    model = se_inject.inject(copy.deepcopy(base))
    calls = []
    for path in block_paths(model):
        model.get_submodule(path).register_forward_hook(lambda *a, path=path: calls.append(path))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        model.forward_features(x)
        through_forward, calls[:] = list(calls), []
        features = model.forward_intermediates(x, intermediates_only=True)
        expected = base.forward_intermediates(x, intermediates_only=True)
    assert calls == through_forward and len(calls) == 13
    assert all(torch.equal(a, b) for a, b in zip(features, expected, strict=True))


class NormEnd(Unit):
    """Its branch ends with a norm, into which may be written."""

    def __init__(self):
        super().__init__()
        self.b = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16))


class Autocast(Unit):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.b(self.a(x))
        return x + y.float()


class Frozen(Unit):
    def forward(self, x):
        with torch.no_grad():
            y = self.a(x)
        return x + self.b(y)


class Counting(Unit):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return x + self.b(self.a(x))


class Remembering(Unit):
    def forward(self, x):
        self.last = x
        return x + self.b(self.a(x))


class Drawing(Unit):
    def forward(self, x):
        y = self.b(self.a(x))
        return x + y * (2 if random.random() < 0.5 else 1)


class Writing(NormEnd):
    """Not followed by fx: an assignment to a part."""

    def forward(self, x):
        y = self.b(self.a(x))
        y[:, 0] = 0
        return x + y


@pytest.mark.parametrize("unit, reason", [
    (Autocast, "grad or autocast mode"), (Frozen, "grad or autocast mode"), (Counting, "sets attributes or buffers"),
    (Remembering, "sets attributes or buffers"), (Drawing, "draws random numbers"), (Writing, "cannot be traced")])
def test_what_a_trace_cannot_hold_is_skipped_with_the_reason(unit, reason):
    model = Net(Unit(), unit())
    plan = se_inject.plan(model, input_size=(3, 16, 16))
    assert [s.path for s in plan.sites] == ["units.0.se"]
    assert [(s.owner, s.kind) for s in plan.skipped] == [("units.1", "unknown")] and reason in plan.skipped[0].reason
    if unit not in (Counting, Drawing):  # these differ from run to run
        check_identity(model, (3, 16, 16))
    with pytest.raises(se_inject.NoSitesError, match=reason):  # and no convolution inside is gated instead
        se_inject.inject(Net(unit()), input_size=(3, 16, 16))


class InPlaceFunction(NormEnd):
    def forward(self, x):
        y = self.b(self.a(x))
        nn.functional.relu(y, inplace=True)
        return x + y


class InPlaceView(NormEnd):
    def forward(self, x):
        y = self.b(self.a(x))
        y.view(y.shape[0], -1).mul_(0.5)
        return x + y


class InPlaceAlias(NormEnd):
    def forward(self, x):
        y = self.b(self.a(x))
        out = y
        y += x
        return nn.functional.gelu(out)


class InPlaceModule(NormEnd):
    def __init__(self):
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.b(self.a(x))
        self.act(y)
        return x + y


@pytest.mark.parametrize("unit", [InPlaceFunction, InPlaceView, InPlaceAlias, InPlaceModule])
def test_memory_that_is_written_in_place(unit):
    model = Net(unit())
    try:
        check_identity(model, (3, 16, 16))
    except se_inject.NoSitesError as error:
        assert "changed in place" in str(error) or "cannot be traced" in str(error)


class InPlaceOfASum(InPlaceModule):
    def forward(self, x):
        h = x + self.a(x)
        return h + self.b(self.act(h))


@pytest.mark.parametrize("placement", ["auto", "pre", "identity"])
def test_a_child_that_writes_into_what_its_owner_computed(placement):
    try:
        check_identity(Net(InPlaceOfASum()), (3, 16, 16), placement=placement)
    except se_inject.NoSitesError as error:
        assert "changed in place" in str(error)


class IntoItsInput(NormEnd):
    def forward(self, x):
        x += self.b(self.a(x))
        return x


class IntoItsInputByParts(NormEnd):
    """Also with numbers, of which one is read again."""

    def forward(self, x):
        height = x.shape[2]
        height *= 2
        more = height
        more += 2
        x -= self.b(self.a(x)) * 0.5 * (more - height)
        x /= 2
        x *= height / x.shape[2]
        return x


class IntoItsChildsOutput(NormEnd):
    """What is gated lies in the input's memory, into which is written after it."""

    def __init__(self):
        super().__init__()
        self.c, self.unit = nn.Conv2d(16, 16, 1), IntoItsInput()

    def forward(self, x):
        z = self.c(x)
        y = self.unit(x)
        y += z
        return y


class Caller(Net):
    """Reads what it gave to its unit, instead of the result or beside it."""

    def __init__(self, unit, both):
        super().__init__(unit)
        self.both = both

    def forward(self, x):
        x = self.stem(x)
        y = self.units(x)
        return self.head((torch.cat([x, y]) if self.both else x).mean((2, 3)))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated:FutureWarning")
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("unit", [IntoItsInput, IntoItsInputByParts])
def test_what_is_written_into_an_argument_is_seen_by_the_caller(unit, both):
    base = randomise(Caller(unit(), both)).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = base(x)
        model = se_inject.inject(copy.deepcopy(base), input_size=(3, 16, 16))
        assert torch.equal(model(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
        shut = copy.deepcopy(model)
        for path in block_paths(shut):
            shut.get_submodule(path).gain = 0.0
        assert not torch.allclose(shut(x), expected)
        exported = torch.export.export(model, (x,)).module()
        assert torch.equal(exported(x), expected)
        scripted = torch.jit.script(model)
        assert torch.equal(scripted(x), expected)


def test_a_gate_on_the_callers_memory_is_refused():
    with pytest.raises(se_inject.NoSitesError, match="changed in place"):
        se_inject.inject(Caller(IntoItsChildsOutput(), False), input_size=(3, 16, 16))


class ChangesNames(NormEnd):
    """Grows a list and numbers by operators; no tensor that is read again."""

    def forward(self, x):
        height, parts = x.shape[2], []
        half = height
        half //= 2
        parts += [x[:, :, :half], x[:, :, half:height]]
        y = self.b(self.a(x))
        y += torch.cat(parts, 2)
        return y


def test_operators_that_change_numbers_and_lists():
    check_identity(Net(ChangesNames()), (3, 16, 16))
    check_identity(Net(ChangesNames(), ChangesNames()), (3, 16, 16), placement="post")


class PreActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = nn.ReLU(inplace=True)
        self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x):
        return self.b(self.act(self.a(self.act(x)))) + x


@pytest.mark.parametrize("placement", ["auto", "inner", "pre", "post", "identity"])
def test_an_input_that_is_changed_in_place(placement):
    """The shortcut is what the first activation left in the input's memory."""
    model = Net(PreActivation())
    if placement in ("pre", "identity"):
        with pytest.raises(se_inject.NoSitesError, match="changed in place"):
            se_inject.inject(model, input_size=(3, 16, 16), placement=placement)
    else:
        check_identity(model, (3, 16, 16), placement=placement)


class Early(Unit):
    def forward(self, x):
        if x.shape[-1] < 4:
            return x
        return x + self.b(self.a(x))


class Commuted(Branching):
    """The operands of the sum change places between the ways."""

    def forward(self, x):
        if x.shape[2] % 2 == 0:
            return self.work(x) + x
        return x + self.work(nn.functional.pad(x, (0, 1, 0, 1)))[:, :, :-1, :-1]


@pytest.mark.parametrize("unit, sides", [(Early, (18, 5)), (Commuted, (18, 19))])
def test_ways_that_differ(unit, sides):
    model = Net(unit()).eval()
    se_inject.inject(model, input_size=(3, sides[0], sides[0]))
    shut = copy.deepcopy(model)
    shut.units[0].se.gain = 0.0
    for side in sides:
        x = torch.randn(2, 3, side, side)
        with torch.no_grad():
            assert torch.equal(shut(x), model.head(model.stem(x).mean((2, 3))))  # only the branch is gated


class BatchSecond(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.attn = nn.Conv2d(3, 16, 4, 4), nn.MultiheadAttention(16, 2)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x).flatten(2).permute(2, 0, 1)  # (L, N, C)
        y = self.norm(x)
        return self.head((x + self.attn(y, y, y)[0]).mean(0))


def test_the_batch_is_never_squeezed():
    plan = se_inject.plan(BatchSecond(), input_size=(3, 32, 32))
    assert not plan.sites and "the batch is not the first axis" in plan.skipped[0].reason


def test_sequences_of_channels_first_are_refused():
    class Wave(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b = nn.Conv1d(3, 16, 3), nn.Conv1d(16, 16, 3, padding=1), nn.Conv1d(16, 16, 1)

        def forward(self, x):
            x = self.stem(x.flatten(2))
            return x + self.b(torch.relu(self.a(x)))

    plan = se_inject.plan(Wave(), input_size=(3, 8, 8))
    assert not plan.sites and "layout of shape" in plan.skipped[0].reason


class Named(Unit):
    def forward(self, x):
        y = torch.add(input=x, other=self.b(self.a(x)))
        return torch.cat(tensors=[y, x], dim=1)[:, :16]


def test_arguments_by_name():
    check_identity(Net(Named()), (3, 16, 16))


@pytest.mark.parametrize("name, placement", [("resnet18", "standard"), ("vovnet39a", "post"), ("nf_resnet26", "inner")])
def test_planning_an_injected_model_changes_nothing(name, placement):
    model = se_inject.inject(timm.create_model(name).eval(), placement=placement)
    classes, x = [type(m) for m in model.modules()], torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(x)
        plan = se_inject.plan(model, placement=placement)
        assert not plan.sites and [type(m) for m in model.modules()] == classes
        assert torch.equal(model(x), before)


def test_an_attribute_of_every_owner_is_set():
    base = randomise(timm.create_model("tiny_vit_5m_224")).eval()
    model = se_inject.inject(copy.deepcopy(base))
    x = torch.randn(1, 3, 224, 224)
    for m in model.modules():
        if "_se_edits" in m.__dict__:
            m.note = "anything"
    se_inject.plan(model)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(x), base(x))
        assert torch.equal(model(x), base(x))
    script = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(script(x), base(x))


class Own(Unit):
    def __setattr__(self, name, value):
        if name == "width":
            value = 2 * value
        super().__setattr__(name, value)


def test_the_authors_own_setattr_is_called():
    model = se_inject.inject(Net(Own()), input_size=(3, 16, 16))
    model.units[0].width = 3
    assert model.units[0].width == 6


@pytest.mark.parametrize("size", [224, "a", (3, 32.0, 32), (3, -1, 2), (3, 32)])
def test_a_wrong_input_size_is_said(size):
    with pytest.raises(se_inject.SEInjectError, match="expected \\(C, H, W\\)"):
        se_inject.plan(Net(Unit()), input_size=size)


def test_what_is_no_model_and_what_has_no_weights_yet():
    with pytest.raises(se_inject.SEInjectError, match="needs a model"):
        se_inject.eject("resnet18")
    with pytest.raises(se_inject.SEInjectError, match="lazy layers"):
        se_inject.inject(nn.Sequential(nn.LazyConv2d(16, 3), nn.ReLU()))


def test_the_positions_of_a_sequential_are_its_authors():
    """Code that iterates or indexes a Sequential counts the layers that it put there, and runs the blocks with them."""
    model = randomise(timm.create_model("vgg11", mlp_ratio=0.02)).eval()
    x = torch.randn(1, 3, 64, 64)
    names = [type(m).__name__ for m in model.features]
    with torch.no_grad():
        last, features = model.forward_intermediates(x, indices=[1, 3])
        se_inject.inject(model)
        again, ours = model.forward_intermediates(x, indices=[1, 3])
        assert torch.equal(last, again) and all(map(torch.equal, features, ours))
        for block in block_paths(model):
            torch.nn.init.normal_(model.get_submodule(block).fc2.bias)
        gated = model.forward_intermediates(x, indices=[1, 3], intermediates_only=True)
        assert not any(map(torch.equal, gated, ours))
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        assert all(torch.equal(m(x), model(x)) for m in copies)
        twin, _ = copies
        twin.prune_intermediate_layers([1])
        assert len(twin.features) < len(names) and block_paths(twin) == block_paths(model)[:2]
        assert torch.equal(twin.forward_intermediates(x, indices=[1], intermediates_only=True)[0], gated[0])
        y = x
        for i in range(len(model.features)):
            y = model.features[i](y)
        assert torch.equal(y, model.features(x)) and not torch.equal(y, last)
    assert len(model.features) == len(names) and model.features[-1] is list(model.features)[-1]
    assert model.features[0].out_channels == 64 and model.features[1].inplace
    gated = model.features[1]  # a layer with a block behind it
    with torch.no_grad():
        y = model.features[0](x)
        assert all(torch.equal(twin(y.clone()), gated(y.clone())) for twin in (
            copy.copy(gated), copy.deepcopy(gated), pickle.loads(pickle.dumps(gated))))
    gated.inplace = False
    assert not model.features.get_submodule("1").inplace
    with pytest.raises(se_inject.SEInjectError, match="eject"):
        del model.features[0]
    se_inject.eject(model)
    assert [type(m).__name__ for m in model.features] == names and type(model.features) is torch.nn.Sequential


def test_a_rewritten_root_is_compiled_whole():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU())

        def forward(self, x):
            for layer in self.features:
                x = layer(x)
            return x

    model, x = randomise(se_inject.inject(Net().eval(), input_size=(3, 32, 32))), torch.randn(2, 3, 32, 32)
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))
    assert torch.equal(torch.compile(model.features, backend="eager", fullgraph=True)(x), model.features(x))
