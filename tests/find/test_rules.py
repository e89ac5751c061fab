"""Where blocks go, on toys that carry their own expected result."""

import pytest
import timm
import torch
from torch import nn

import se_inject
from se_inject.blocks.squeeze_excite import SqueezeExcite
from se_inject.timm_names import skeleton

from ..support.toys import Net, conv


def needs(name: str) -> None:
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")


class Toy(nn.Module):
    """A stem and one unit; `expected` are (slot, kind, channels) of the unit's sites."""

    expected: tuple[tuple[str, str, int], ...] = ()

    def __init__(self):
        super().__init__()
        self.a, self.b = conv(16, 16), nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16))
        self.c = conv(16, 16)


class Residual(Toy):
    expected = (("se", "residual", 16),)

    def forward(self, x):
        return torch.relu(self.b(self.a(x)) + x)


class InPlace(Toy):
    expected = (("se", "residual", 16),)

    def forward(self, x):
        y = self.b(self.a(x))
        y += x
        return y.relu_()


class Scaled(Toy):
    expected = (("se", "residual", 16),)

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((16, 1, 1), 0.5))

    def forward(self, x):
        return x + self.b(self.a(x)) * self.gamma * 0.2


class Projection(Toy):
    """Both operands have convolutions: the shortcut is the one with less work."""

    expected = (("se", "residual", 16),)

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(16, 16, 1)

    def forward(self, x):
        return self.down(x) + self.b(self.a(x))


class TwoBranches(Toy):
    expected = (("se1", "residual", 16), ("se2", "residual", 16),)

    def forward(self, x):
        return x + self.b(self.a(x)) + self.c(x)


class Partial(Toy):
    """RexNet: the shortcut has fewer channels than the branch."""

    expected = (("se", "residual", 32),)

    def __init__(self):
        super().__init__()
        self.wide = nn.Sequential(conv(16, 32), nn.Conv2d(32, 32, 1))

    def forward(self, x):
        y = self.wide(x)
        return torch.cat([y[:, 0:16] + x, y[:, 16:]], dim=1)


class Reparameterised(Toy):
    """A sum of convolutions before the activation is one convolution: no residual; the unit is a plain conv."""

    expected = (("se", "conv", 16),)

    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(16, 16, 1)

    def forward(self, x):
        return self.one(x) + self.b(x) + x


class Concat(Toy):
    expected = (("se", "aggregation", 32),)

    def forward(self, x):
        return torch.cat([self.a(x), self.c(x)], 1)


class Dense(Toy):
    """DenseNet: the new features are the unit; the old ones pass untouched."""

    expected = (("se", "aggregation", 16),)

    def forward(self, x):
        return torch.cat([x, self.a(x)], 1)


class Shuffled(Toy):
    """ShuffleNetV2: half of the channels pass, and the fork is a tuple of halves."""

    expected = (("se", "aggregation", 8),)

    def __init__(self):
        super().__init__()
        self.right = conv(8, 8)

    def forward(self, x):
        x1, x2 = x.chunk(2, 1)
        return torch.cat([x1, self.right(x2)], 1)


class DualPath(Toy):
    """DPN: of a branch, a part is added to one part of the shortcut, and a part is put beside the other."""

    expected = (("se", "residual", 16),)

    def forward(self, x):
        y = self.b(self.a(x))
        return torch.cat([x[:, :12] + y[:, :12], x[:, 12:], y[:, 12:]], 1)


class Stacked(Toy):
    """Parallel branches that are stacked and summed."""

    expected = (("se1", "residual", 16), ("se2", "residual", 16))

    def forward(self, x):
        return x + torch.stack([self.a(x), self.c(x)]).sum(dim=0)


class LastLayout(Toy):
    """EdgeNeXt: layer scale in another layout than the sum; the gate is before it."""

    expected = (("se", "residual", 16),)

    def __init__(self):
        super().__init__()
        self.fc, self.gamma = nn.Linear(16, 16), nn.Parameter(torch.full((16,), 0.5))

    def forward(self, x):
        y = self.fc(self.a(x).permute(0, 2, 3, 1))
        return x + (self.gamma * y).permute(0, 3, 1, 2)


class Position(Toy):
    """A sum with an embedding is no residual."""

    expected = (("se", "residual", 16),)

    def __init__(self):
        super().__init__()
        self.pos = nn.Parameter(torch.zeros(1, 16, 8, 8))

    def forward(self, x):
        x = x + self.pos
        return x + self.b(self.a(x))


class Gated(Toy):
    """Channel attention written in the forward, by no known class."""

    expected = ()

    def __init__(self):
        super().__init__()
        self.gate = nn.Conv2d(16, 16, 1)

    def forward(self, x):
        y = self.b(self.a(x))
        return x + y * self.gate(y.mean((2, 3), keepdim=True)).sigmoid()


TOYS = [
    Residual, InPlace, Scaled, Projection, TwoBranches, Partial, Concat, Dense, Shuffled, DualPath, Stacked, LastLayout,
    Position]


@pytest.mark.parametrize("toy", [*TOYS, Gated])
def test_sites(toy):
    plan = se_inject.plan(Net(toy()), input_size=(3, 8, 8))
    assert tuple((s.slot, s.kind, s.channels) for s in plan.sites) == toy.expected
    assert all(s.owner == "unit" for s in plan.sites)


@pytest.mark.parametrize("toy", TOYS)
def test_gate_is_where_the_plan_says(toy):
    """With every gate shut, only what the plan leaves ungated is left of the unit; at identity all of it is."""
    model = Net(toy()).eval()
    x = torch.randn(2, 3, 8, 8)
    before = model(x)
    se_inject.inject(model, input_size=(3, 8, 8))
    assert torch.equal(model(x), before)
    seen = []
    for m in model.modules():
        if isinstance(m, SqueezeExcite):
            m.register_forward_hook(lambda mod, args, out: seen.append(torch.equal(args[0], out)))
    model(x)
    assert seen == [True] * len(toy.expected)
    for m in model.modules():
        if isinstance(m, SqueezeExcite):
            m.gain = 0.0
    u, s = model.unit, model.stem(x)
    zero = {  # the unit's value with the branch gone
        Residual: lambda: torch.relu(s), InPlace: lambda: torch.relu(s), Scaled: lambda: s,
        Projection: lambda: u.down(s), TwoBranches: lambda: s,
        Partial: lambda: torch.cat([s, torch.zeros_like(s)], 1),
        Concat: lambda: torch.zeros(2, 32, 8, 8), Dense: lambda: torch.cat([s, torch.zeros_like(s)], 1),
        Shuffled: lambda: torch.cat([s[:, :8], torch.zeros_like(s[:, 8:])], 1),
        DualPath: lambda: torch.cat([s, torch.zeros_like(s[:, 12:])], 1), Stacked: lambda: s, LastLayout: lambda: s,
        Position: lambda: s + u.pos}[toy]
    assert torch.equal(model(x), zero().mean((2, 3)))


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((16, 1, 1), 0.5))

    def forward(self, x):
        return x * self.gamma


class Nested(Toy):
    """A branch that is one child, which ends with its layer scale."""

    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(conv(16, 16), nn.Conv2d(16, 16, 1), Scale())

    def forward(self, x):
        return x + self.branch(x)


class Stage(Toy):
    """CSPNet: a concat around residual blocks is a stage, and the blocks are the units."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Residual(), Residual())

    def forward(self, x):
        return torch.cat([self.a(x), self.blocks(x)], 1)


class Collected(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = conv(16, 16), conv(16, 16)

    def forward(self, x):
        y = self.one(x)
        return torch.cat([x, y, self.two(y)], 1)


class Fused(Toy):
    """VoVNet: a child returns the concat, and its caller fuses it."""

    def __init__(self):
        super().__init__()
        self.collect, self.fuse = Collected(), conv(48, 16)

    def forward(self, x):
        return self.fuse(self.collect(x))


class LongSkip(Toy):
    """EDSR: a skip around a stage of residual blocks is no unit of its own."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(Residual(), Residual(), nn.Conv2d(16, 16, 3, padding=1))

    def forward(self, x):
        return x + self.body(x)


class Streams(Toy):
    """TNT: a stream that goes on by itself is gated too, although another is computed from it."""

    def forward(self, x):
        p = x + self.a(x)
        return p, x + self.b(self.c(p))


class Pooled(Toy):
    def forward(self, x):
        return self.c(x + nn.functional.avg_pool2d(x, 3, 1, 1))


class Encoded(Toy):
    def forward(self, x):
        return self.c(x + self.b(x))


class Both(Encoded):
    """A linear sum beside a real branch changes no name."""

    def forward(self, x):
        x = x + self.b(x)
        return x + self.c(x)


@pytest.mark.parametrize("toy, paths", [
    (Nested, ["unit.branch.se"]), (Stage, ["unit.blocks.0.se", "unit.blocks.1.se"]), (Fused, ["unit.se"]),
    (Both, ["unit.se"]), (LongSkip, ["unit.body.0.se", "unit.body.1.se"])])  # fmt: skip
def test_owners(toy, paths):
    model = Net(toy()).eval()
    x = torch.randn(2, 3, 8, 8)
    before = model(x)
    assert [s.path for s in se_inject.plan(model, input_size=(3, 8, 8)).sites] == paths
    assert torch.equal(se_inject.inject(model, input_size=(3, 8, 8))(x), before)


def test_the_gate_of_a_nested_branch_is_before_its_scale():
    model = se_inject.inject(Net(Nested()), input_size=(3, 8, 8))
    assert [type(m).__name__ for m in model.unit.branch.children()] == ["Sequential", "Conv2d", "SqueezeExcite", "Scale"]


def test_two_streams():
    model = nn.Sequential(nn.Conv2d(3, 16, 1), Streams())
    plan = se_inject.plan(model, input_size=(3, 8, 8))
    assert [(s.path, s.kind) for s in plan.sites] == [("1.se1", "residual"), ("1.se2", "residual")]


@pytest.mark.parametrize("toy, reason", [(Pooled, "no convolution or linear layer"), (Encoded, "branch is linear")])
def test_a_sum_that_is_no_residual_is_said(toy, reason):
    plan = se_inject.plan(Net(toy()), input_size=(3, 8, 8))
    assert any(s.kind == "residual" and reason in s.reason for s in plan.skipped)
    assert all(s.kind != "residual" for s in plan.sites)


def test_inner_is_where_the_branchs_convolution_is():
    model = se_inject.inject(Net(Nested()), input_size=(3, 8, 8), placement="inner")
    assert [type(m).__name__ for m in model.unit.branch.children()] == ["Sequential", "SqueezeExcite", "Conv2d", "Scale"]
    plan = se_inject.plan(Net(Concat()), input_size=(3, 8, 8), placement="inner")
    assert not plan.sites and "one convolution over space that the whole branch goes through" in plan.skipped[0].reason
    assert len(se_inject.plan("densenet121", placement="inner").sites) == 58  # a new feature ends with its convolution


def test_a_part_of_the_input_is_gated_as_a_shortcut():
    """DPN's shortcuts are views of one map, into which nothing is written."""
    plan = se_inject.plan("dpn68", placement="identity")
    assert len(plan.sites) == 22 and not any("in place" in s.reason for s in plan.skipped)


def test_pre_gates_each_input_once():
    model = se_inject.inject(Net(TwoBranches()), input_size=(3, 8, 8), placement="pre")
    seen = []
    for child in (model.unit.a, model.unit.c):
        child.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model(torch.randn(2, 3, 8, 8))
    assert seen[0] is seen[1]  # both branches read the gated input


@pytest.mark.parametrize("size", [(3, 12, 12), (3, 32, 24), (3, 24, 32), (3, 32, 48), (3, 64, 32)])
@pytest.mark.parametrize("name", ["test_convnext", "resnet18", "test_byobnet", "edgenext_xx_small", "fasternet_t0"])
def test_channels_are_told_from_height_and_width(name, size):
    """At some of these sizes a map has as many rows or columns as channels."""
    needs(name)
    options = {"existing": "stack"} if name == "test_byobnet" else {}
    square = se_inject.plan(name, input_size=(3, 256, 256), **options)
    other = se_inject.plan(name, input_size=(3, 8 * size[1], 8 * size[2]), **options)
    assert [(s.path, s.layout, s.channels, s.stage) for s in other.sites] == [
        (s.path, s.layout, s.channels, s.stage) for s in square.sites]


@pytest.mark.parametrize("name, stages", [
    ("twins_svt_small", {0, 1, 2, 3}),  # its feature info names modules that are not there
    ("hrnet_w18_small", {1, 2, 3, 4}),  # likewise; by resolution
    ("gemma4_vit_167m", set(range(16))),  # named without the wrapper around them
    ("legacy_xception", {1, 2, 3, 4}),  # taps inside the blocks
    ("coat_tiny", {0, 1, 2, 3})])  # one module for three entries
def test_stages_are_out_indices(name, stages):
    needs(name)
    model = skeleton(name)
    if not getattr(model, "feature_info", None):
        pytest.skip(f"this timm has no feature info of {name}")
    assert {s.stage for s in se_inject.plan(model).sites} == stages


def test_existing_attention_is_named_and_stacks():
    model = Net(Gated())
    with pytest.raises(se_inject.NoSitesError, match=r'already have channel attention: use existing="stack"'):
        se_inject.inject(model, input_size=(3, 8, 8))
    se_inject.inject(model, input_size=(3, 8, 8), existing="stack")
    assert isinstance(model.unit.se, SqueezeExcite)


def test_existing_attention_is_replaced_and_comes_back():
    model = timm.create_model("seresnet18").eval()
    keys, x = list(model.state_dict()), torch.randn(1, 3, 64, 64)
    before = model(x)
    plan = se_inject.plan(model, existing="replace", ratio=0.5)
    assert len(plan.sites) == 8 and not plan.skipped
    assert plan.sites[0].replaces == tuple(k for k in keys if k.startswith("layer1.0.se."))
    assert "layer1.0.se  replaces layer1.0.se.fc1.weight, " in str(plan)
    se_inject.inject(model, existing="replace", ratio=0.5)
    assert isinstance(model.layer1[0].se, SqueezeExcite) and model.layer1[0].se.fc1.out_channels == 32
    assert list(model.state_dict()) == keys
    assert torch.equal(se_inject.eject(model)(x), before)
    with pytest.raises(se_inject.NoSitesError, match="no module that could be swapped"):
        se_inject.inject(Net(Gated()), input_size=(3, 8, 8), existing="replace")


def test_a_module_called_twice():
    """One owner, one block: both calls go through it. A child called twice is gated where its branch ends."""
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.unit = nn.Conv2d(3, 16, 1), Residual()

        def forward(self, x):
            return self.unit(self.unit(self.stem(x))).mean((2, 3))

    class Shared(Toy):
        def forward(self, x):
            return x + self.b(self.a(self.a(x)))

    x = torch.randn(2, 3, 8, 8)
    for model in (Twice(), Net(Shared())):
        model.eval()
        before = model(x)
        plan = se_inject.plan(model, input_size=(3, 8, 8))
        assert [s.path for s in plan.sites] == ["unit.se"]
        se_inject.inject(model, input_size=(3, 8, 8))
        assert torch.equal(model(x), before)
    calls = []
    twice = se_inject.inject(Twice(), input_size=(3, 8, 8))
    twice.unit.se.register_forward_hook(lambda *a: calls.append(1))
    twice(x)
    assert len(calls) == 2


def test_a_forward_that_differs_between_modes_is_never_baked():
    class Modes(Toy):
        def forward(self, x):
            y = self.b(self.a(x)) if self.training else self.c(x)
            return x + y

    model = Net(Modes())
    with pytest.raises(se_inject.NoSitesError, match="differs between train and eval mode"):
        se_inject.inject(model, input_size=(3, 8, 8))
    assert type(model.unit) is Modes


@pytest.mark.parametrize("channels", [1, 2, 3, 8, 24])
def test_squeeze_width_is_never_zero(channels):
    from se_inject.blocks.build import block_spec
    from se_inject.config import SEConfig

    assert block_spec(SEConfig(ratio=0.001, rd_divisor=1), channels, channels, "NCHW", "se").rd_channels == 1
    assert block_spec(SEConfig(), channels, channels, "NCHW", "se").rd_channels >= 1


@pytest.mark.parametrize("layout, shape", [("NCHW", (2, 8, 4, 4)), ("NHWC", (2, 4, 4, 8)), ("NLC", (2, 16, 8))])
def test_the_block_computes_the_papers_formula(layout, shape):
    block = SqueezeExcite(8, 4, layout)
    x = torch.randn(shape)
    dim = 1 if layout == "NCHW" else len(shape) - 1
    z = x.movedim(dim, -1).flatten(1, -2).mean(1)
    w1, w2 = block.fc1.weight.flatten(1), block.fc2.weight.flatten(1)
    gate = torch.sigmoid(torch.relu(z @ w1.T + block.fc1.bias) @ w2.T + block.fc2.bias)
    view = [2] + [1] * (len(shape) - 1)
    view[dim] = 8
    torch.testing.assert_close(block(x), x * gate.view(view))


@pytest.mark.parametrize("gate", ["tanh", "relu"])
def test_a_gate_that_cannot_start_as_identity_is_refused(gate):
    with pytest.raises(se_inject.SEInjectError, match="gate_layer"):
        se_inject.inject(Net(Residual()), input_size=(3, 8, 8), gate_layer=gate)


def test_filters():
    names = [s.path for s in se_inject.plan("resnet18", include="layer[12].*", exclude="*.0.se").sites]
    assert names == ["layer1.1.se", "layer2.1.se"]
    assert len(se_inject.plan("resnet18", min_channels=256).sites) == 4
    plan = se_inject.plan("resnet18", filter_fn=lambda s: s.size == (7, 7))
    assert [s.stage for s in plan.sites] == [4, 4]
    assert {s.reason for s in plan.skipped} == {"filter_fn said no"}


def test_plan_adds_up_and_goes_to_json():
    import json

    model = timm.create_model("mobilenetv2_100")
    plan = se_inject.plan(model)
    before = sum(p.numel() for p in model.parameters())
    se_inject.inject(model)
    assert sum(p.numel() for p in model.parameters()) == before + plan.added_params
    said = json.loads(json.dumps(plan.to_dict()))
    assert said["added_params"] == plan.added_params and len(said["sites"]) == len(plan.all_sites)
    assert str(plan).splitlines()[-1].startswith(f"mobilenetv2_100: {len(plan.sites)} sites, 0 skipped; {before:,} + ")
