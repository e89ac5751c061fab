"""Forwards in which a write in place, or a moved operator, would be wrong: the optimized copy leaves them alone."""

import contextlib
import copy
import itertools
import operator
import types

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import se_inject
from se_inject.blocks import catalogue

from ..support.checks import randomise, total
from .test_optimize import deviation


class SE(nn.Module):
    def __init__(self, channels, reduced=4):
        super().__init__()
        self.a, self.b = nn.Conv2d(channels, reduced, 1), nn.Conv2d(reduced, channels, 1)

    def gate(self, x):
        return self.b(self.a(x.mean((2, 3), keepdim=True)).relu()).sigmoid()

    def forward(self, x):
        return x * self.gate(x)


class Parts(nn.Module):
    """The modules and parameters that the forwards below use."""

    def __init__(self):
        super().__init__()
        self.stem, self.other = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.point, self.wide, self.linear = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 32, 1), nn.Linear(8, 8)
        self.norm, self.act, self.se, self.wide_se = nn.BatchNorm2d(8), nn.ReLU(inplace=True), SE(8), SE(32)
        self.gain = nn.Parameter(torch.rand(8, 1, 1) + 0.5)


def net(forward, child=None, **children):
    """A model with this forward. A child that is a function is the forward of a module that is made in the same way."""
    model = type("Net", (Parts,), {"forward": forward})()
    for name, c in {"child": child, **children}.items():
        if c is not None:
            model.add_module(name, c if isinstance(c, nn.Module) else net(c))
    return randomise(model).eval()


def last(*values):
    """The value of the last of several statements, so that a forward can be one expression."""
    return values[-1]


def cases(group, marks=None):
    """Parameters from values, or tuples of values, by their names; `marks` has marks for some of the names."""
    return pytest.mark.parametrize("case", [
        pytest.param(v if isinstance(v, tuple) else (v,), id=k, marks=(marks or {}).get(k, ())) for k, v in group.items()])


def image(batch, side):
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def check(model, sides=(16, 24), batches=(2, 1), run=lambda m, x: m(x)):
    """The copy is traced at the first size, computes what the model does at all sizes, and changes neither model nor input."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    fast = se_inject.optimize_for_inference(model, input_size=(3, sides[0], sides[0]))
    layouts = (torch.contiguous_format, torch.channels_last, torch.contiguous_format)
    for side, batch, layout in itertools.product(sides, batches, layouts):
        x = image(batch, side).contiguous(memory_format=layout)
        expected, given = total(run(model, x.clone())).clone(), x.clone()
        out = total(run(fast, given))
        assert out.shape == expected.shape
        assert deviation(expected, out) < 1e-5, (side, batch, layout)
        assert torch.equal(given, x), "the input was changed"
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    return fast


# the gate must be computed after the write into the block's input
@cases({
    "module": lambda m, x: last(y := m.stem(x), m.act(y), m.se(y)),
    "function": lambda m, x: last(y := m.stem(x), F.relu_(y), m.se(y)),
    "method": lambda m, x: last(y := m.point(m.stem(x)), y.add_(1.0), m.se(y)),
    "view": lambda m, x: last(y := m.point(m.stem(x)), y.flatten(2).add_(1.0), m.se(y)),
    "upstream": lambda m, x: last(y := m.stem(x), z := m.wide(y), y.relu_(), m.wide_se(z).sum(1, keepdim=True) + y),
    "wide, function": lambda m, x: last(y := m.wide(m.stem(x)), F.relu_(y), m.wide_se(y)),
    "wide, method": lambda m, x: last(y := m.wide(m.stem(x)), y.add_(1.0), m.wide_se(y)),
    "wide, in a child": (lambda m, x: m.wide_se(m.child(m.stem(x))), lambda m, x: last(y := m.wide(x), y.add_(1.0), y)),
    "wide, in a child before": (lambda m, x: m.wide_se(m.wide(m.child(x))), lambda m, x: last(y := m.stem(x), y.add_(1.0), y)),
})
def test_an_input_changed_in_place_is_squeezed_after_that(case):
    check(net(*case))


def test_a_child_returns_a_view_of_what_it_writes_into():
    check(net(lambda m, x: last(h := m.stem(x), v := m.child(h), v[:, :, :1, :1] * h),
              lambda m, x: x.mul_(0.7).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)))


@cases({
    "add_": lambda m, x: last(h := m.stem(x), h.add_(m.other(x)), h.sin()),
    "add_ of a product": lambda m, x: last(h := m.stem(x), h.add_(m.gain * m.other(x)), h.sin()),
    "add_ of a product, view": lambda m, x: last(h := m.stem(x), v := h.flatten(2), h.add_(m.gain * m.other(x)), v.sin()),
    "mul_": lambda m, x: last(h := m.stem(x), h.mul_(m.gain), h.sin() + m.other(x)),
    "mul_, view": lambda m, x: last(h := m.stem(x), v := h.flatten(2), h.mul_(m.gain), v.sin()),
})
def test_what_is_written_in_place_is_read_after_that(case):
    check(net(*case))


@pytest.mark.parametrize("child", [
    lambda m, x: x.add_(m.point(x)), lambda m, x: operator.iadd(x, m.point(x)), lambda m, x: x.mul_(m.gain),
    lambda m, x: m.point(x) + x.mul_(m.gain), lambda m, x: x.mul_(m.se.gate(x)), lambda m, x: m.act(x)],
    ids=["add_", "+=", "mul_", "mul_ in a sum", "gate", "activation"])
@cases({
    "reread": lambda m, x: last(y := m.stem(x), z := m.child(y), z.sin() + y),
    "dropped": lambda m, x: last(y := m.stem(x), m.child(y), y),
    "in a sum": lambda m, x: last(y := m.stem(x), z := m.other(x) + m.child(y), z.sin() + y),
    "before a block": lambda m, x: last(y := m.stem(x), m.child(y), m.wide_se(m.wide(y))),
    "of a sum": lambda m, x: last(y := m.stem(x) + m.other(x), z := m.child(y), h := y + m.point(y), h.sin() + z),
    "of a sum, dropped": lambda m, x: last(y := m.stem(x) + m.other(x), m.child(y), m.wide_se(m.wide(y))),
})
def test_what_a_child_writes_into_its_input_is_still_written(case, child):
    check(net(*case, child))


def padded(m, x):
    return F.pad(x, (0, 8 - x.shape[-1] % 8)) if x.shape[-1] % 8 else x


def halved(m, x):
    return x * 0.5 if x.shape[-1] > 16 else x


# (forward, forward of its child, sizes, batches): the second size or batch takes the other branch
@cases({
    "returns early": (lambda m, x: m.child(m.stem(x)), lambda m, x: x if x.shape[-1] < 8 else x + m.point(x), (16, 6)),
    "pads": (lambda m, x: m.point(m.child(m.stem(x))) + m.child2(m.other(x)), padded, (16, 12)),
    "pads before a norm": (lambda m, x: m.norm(m.child(m.stem(x))), padded, (16, 12)),
    "pads before a block": (lambda m, x: m.wide_se(m.child(m.wide(m.stem(x)))), padded, (16, 12)),
    "scales": (lambda m, x: m.other(x) + m.child(m.stem(x)), halved, (16, 32)),
    "scales before a norm": (lambda m, x: m.norm(m.child(m.stem(x))), halved, (16, 32)),
    "scales before a block": (lambda m, x: m.wide_se(m.child(m.wide(m.stem(x)))), halved, (16, 32)),
    "scales, untraceably": (lambda m, x: last(
        y := m.stem(x), (torch.stack(list(y)) * 2 if x.shape[-1] > 16 else y) + m.other(x)), None, (16, 32)),
    "batch": (lambda m, x: m.stem(x) if x.shape[0] > 2 else m.stem(x) + m.other(x), None, (16, 24), (2, 1, 4)),
})
def test_a_forward_takes_either_branch(case):
    check(net(*case[:2], child2=nn.Sequential(net(padded))), *case[2:])


@cases({
    "convolution": lambda m, x: last(y := m.down(x), m.point(y) + m.point2(y.mean((2, 3), keepdim=True))),
    "mean first": lambda m, x: last(y := m.down(x), m.point2(y.mean((2, 3), keepdim=True)) + m.point(y).relu().sin()),
    "product": lambda m, x: last(y := m.point(m.down(x)), z := m.point2(y.mean((2, 3), keepdim=True)) + y, z * y),
    "block": lambda m, x: m.wide_se(m.wide(m.down(x))),
})
def test_a_map_of_one_position_may_have_more(case):
    check(net(*case, down=nn.Conv2d(3, 8, 16, stride=16), point2=nn.Conv2d(8, 8, 1)), (16, 48))


def crop(x):
    return x[:, :, :16, :16].contiguous()


# (forward, forward of its child, sizes): contiguous() and similar methods copy some inputs, and return views of others
@cases({
    "permuted, in a child": (
        lambda m, x: last(h := m.stem(x), m.child(h) * 2 + m.point(h)),
        lambda m, x: last(t := x.permute(0, 2, 3, 1).contiguous(), (t + m.linear(t)).permute(0, 3, 1, 2))),
    "permuted input": lambda m, x: last(t := x.permute(0, 2, 3, 1).contiguous(), (t + m.linear3(t)).sin()),
    "permuted, reread": lambda m, x: last(
        h := m.stem(x), t := h.permute(0, 2, 3, 1).contiguous(), (t + m.linear(t)).sum() * h.sin()),
    "reshaped": lambda m, x: last(
        h := m.stem(x), t := h.permute(0, 2, 3, 1).reshape(x.shape[0], -1, 8), (t + m.linear(t)).sum() * h.sin()),
    "flattened": lambda m, x: last(
        h := m.stem(x), t := h.permute(0, 2, 3, 1).flatten(1, 2), (t + m.linear(t)).sum() * h.sin()),
    "cropped": (lambda m, x: last(h := m.stem(x), (crop(h) + crop(m.other(x))).sin() + crop(h)), None, (20, 16)),
    "cropped in a child": (lambda m, x: last(h := m.stem(x), m.child(h) + crop(m.point(h))),
                           lambda m, x: last(t := crop(x), t + m.point(t)), (20, 16)),
    "cropped input": (lambda m, x: last(t := crop(x), t + m.point3(t)), None, (20, 16)),
    "converted": lambda m, x: last(h := m.stem(x), (h.float() + m.other(x)).sin() + h.to(torch.float32)),
})
def test_what_may_be_a_view_is_not_written_into(case):
    check(net(*case[:2], linear3=nn.Linear(3, 3), point3=nn.Conv2d(3, 3, 1)), *case[2:])


@torch.no_grad()
@cases({
    "float": lambda m, x: last(h := m.stem(x), t := h.float(), u := t + m.other(x).float(), u.sin() + h.float()),
    "to": lambda m, x: last(h := m.stem(x), u := h.to(torch.float32) + m.other(x).float(), u.sin() + h),
})
def test_a_copy_made_in_bfloat16_may_become_float32(case):
    model, x = net(*case).bfloat16(), image(2, 16)
    fast = se_inject.optimize_for_inference(model, input_size=(3, 16, 16)).float()
    assert deviation(model.float()(x), fast(x)) < 1e-5


def kept(m, x):
    m.last = m.stem(x)
    return m.last


def sums(m, x):
    return last(y := m.other(x), m.child(x) + y.sin())


@pytest.mark.parametrize("before", [False, True], ids=["new", "run"])
@pytest.mark.parametrize("batch", [1, 2])
@cases({
    "attribute": (lambda m, x: last(y := m.child(x) + m.other(x), y + m.child.last), kept),
    "attribute, read in a child": (lambda m, x: m.child2(m.child(x) + m.other(x)), kept),
    "made once": (sums, lambda m, x: m.cache.setdefault(
        tuple(x.shape), torch.linspace(0, 1, x.shape[0] * 8 * 256).view(-1, 8, 16, 16) * torch.ones(1))),
    "no buffer": (sums, lambda m, x: m.fixed),
    "view of no buffer": (sums, lambda m, x: m.fixed.view(-1, 8, 256).unflatten(2, (16, 16))),
})
def test_what_a_module_keeps_is_not_written_into(case, batch, before):
    model = net(*case, child2=lambda m, x: x + m.source.last)
    model.child.last, model.child.cache, model.child.fixed = None, {}, torch.randn(batch, 8, 16, 16)
    vars(model.child2)["source"] = model.child
    if before:
        with torch.no_grad():
            model(image(batch, 16))
    check(model, (16,), (batch,))


@cases({"view": lambda m, f, x: x.view(x.shape), "sum": lambda m, f, x: f[0] + x.flatten(2).unflatten(2, x.shape[2:])})
def test_a_child_takes_a_list_and_a_tensor(case):
    check(net(lambda m, x: last(f := m.features(x), h := m.stem(x), v := m.child(f, h), (v + m.other(x)).cos() + h.sin()),
              *case, features=lambda m, x: [m.stem(x), m.other(x), m.point(m.stem(x))]))


@cases({
    "sum": lambda m, x: m.child2(x) + m.point(x.sin()),
    "block": lambda m, x: m.child2(x) + m.se(m.point(m.stem(x))),
})
def test_a_forward_around_that_cannot_be_traced(case):
    check(net(lambda m, x: m.child(torch.stack(list(x))), net(
        *case, stem=nn.Conv2d(3, 3, 1), point=nn.Conv2d(3, 3, 1), se=SE(3), child2=lambda m, x: x.view(x.shape))))


# (forward, batches)
@cases({
    "rows": lambda m, x: last(h := m.stem(x), h[:, :, 1:] + h[:, :, :-1]),
    "rows, other order": lambda m, x: last(h := m.stem(x), h[:, :, :-1] + h[:, :, 1:]),
    "columns": lambda m, x: last(h := m.stem(x), h[..., 1:] + h[..., :-1]),
    "channels": lambda m, x: last(h := m.stem(x), h[:, 1:] + h[:, :-1]),
    "images": (lambda m, x: last(h := m.stem(x), h[1:] + h[:-1]), (3, 2)),
    "rows of a product": lambda m, x: last(h := m.stem(x), h[:, :, 1:] + h[:, :, :-1] * m.gain),
    "columns of a product": lambda m, x: last(h := m.stem(x), h[..., 1:] + h[..., :-1] * m.gain),
    "transposed": lambda m, x: last(h := m.stem(x), h + h.transpose(2, 3)),
    "corner in a sum": lambda m, x: last(h := m.point(m.stem(x)), m.other(x) + h * h[:, :, :1, :1]),
    "corner of the shortcut": lambda m, x: last(h := m.stem(x), h + m.other(x) * h[:, :, :1, :1]),
    "corner twice": lambda m, x: last(h := m.stem(x), k := h[:, :, :1, :1], h * k + k * h.sin()),
    "corner and gain": lambda m, x: last(h := m.stem(x), h * h[:, :, :1, :1] * m.gain),
    "class token": lambda m, x: last(h := m.stem(x).flatten(2).transpose(1, 2), h * h[:, :1] * 2 + m.linear(h)),
    "expanded": lambda m, x: last(
        h := m.stem(x).mean((2, 3), keepdim=True).expand(-1, -1, *x.shape[2:]), (h + m.other(x)) * 2),
    "expanded twice": lambda m, x: last(h := m.stem(x)[:, :1].expand(-1, 8, -1, -1), h + m.other(x).mean((2, 3), keepdim=True)),
    "expanded batch": (lambda m, x: last(h := m.stem(x)[:1].expand(x.shape[0], -1, -1, -1), h + m.gain * m.other(x)), (2, 1)),
})
def test_operands_that_overlap_are_not_written_into(case):
    check(net(*case[:1]), (16, 41), *case[1:])


@torch.no_grad()
@pytest.mark.parametrize("name, made, injected", [
    ("ghostnet_050", {}, None), ("xception41p", {}, None), ("repghostnet_050", {}, None), ("xception41", {}, {}),
    ("resnet26", {}, {"placement": "identity"}), ("mobilenetv3_small_050", {}, {"placement": "inner", "existing": "stack"}),
    ("xception41p", {"features_only": True}, None),
    ("mobilenetv3_small_050", {"features_only": True, "feature_cls": "hook"}, None)])
def test_other_methods_of_the_model(name, made, injected):
    model = randomise(timm.create_model(name, **made)).eval()
    if injected is not None:
        randomise(se_inject.inject(model, **injected), 1)
    fast, x = se_inject.optimize_for_inference(model, input_size=(3, 64, 64)), image(2, 64)
    for method, kwargs in (
            ("forward", {}), ("forward_features", {}), ("forward_intermediates", {"intermediates_only": True})):
        if hasattr(model, method):
            expected, out = getattr(model, method)(x, **kwargs), getattr(fast, method)(x, **kwargs)
            assert len(out) == len(expected), method
            assert all(deviation(a, b) < 1e-5 for a, b in zip(expected, out)), method


@cases({
    "convolution": lambda m, x: m.norm(m.stem(x)) + F.conv2d(x, m.stem.weight, padding=1),
    "norm": lambda m, x: m.norm(m.stem(x)) * m.norm.weight[None, :, None, None],
    "block": lambda m, x: last(y := m.wide(m.stem(x)), m.wide_se(y) + F.conv2d(y.sin(), m.wide_se.a.weight).mean()),
})
def test_weights_that_are_read_elsewhere(case):
    check(net(*case))


@pytest.mark.parametrize("path", ["stem", "norm", "branch", "branch.0", "branch.1", "branch.2"])
@pytest.mark.parametrize("kind", ["output", "input", "collect output", "collect input"])
def test_hooks_work(path, kind):
    model = net(lambda m, x: last(y := m.norm(m.stem(x)), y + m.branch(y)),
                branch=nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), SE(8)))
    module, seen = model.get_submodule(path), []
    hooks = {"output": lambda m, args, out: out * 2 + 1, "input": lambda m, args: (args[0] * 2 + 1,),
             "collect output": lambda m, args, out: seen.append(out), "collect input": lambda m, args: seen.append(args[0])}
    (module.register_forward_hook if "output" in kind else module.register_forward_pre_hook)(hooks[kind])
    check(model, run=lambda m, x: last(seen.clear(), [m(x), *seen]))


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, padding=self.padding)


def frozen(layer, *names):
    for name in names:
        layer.register_buffer(name, layer._parameters.pop(name).detach() + 0.3)


@pytest.mark.parametrize("names", [["bias"], ["weight"], ["weight", "bias"]], ids="-".join)
@pytest.mark.parametrize("kind", [nn.Conv2d, OwnConv, nn.BatchNorm2d])
def test_weights_that_are_buffers(kind, names):
    norm = nn.BatchNorm2d(8)
    conv = (OwnConv if kind is OwnConv else nn.Conv2d)(3, 8, 3, padding=1)
    frozen(norm if kind is nn.BatchNorm2d else conv, *names)
    check(net(lambda m, x: m.after(m.before(x)), before=conv, after=norm))


WEIGHTS = {
    "weight_norm": weight_norm, "spectral_norm": spectral_norm, "prune": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "new weight_norm": parametrizations.weight_norm, "new spectral_norm": parametrizations.spectral_norm,
    "buffers": lambda m: frozen(m, "weight", "bias"), "no buffer": lambda m: None}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("before", [False, True], ids=["new", "run"])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_that_are_no_parameters(kind, before):
    model = net(lambda m, x: m.wide_se(m.scale(m.wide(m.norm(m.child(x))))), nn.Conv2d(3, 8, 3, padding=1),
                scale=lambda m, x: x * m.layer_scale)
    layer_scale = torch.rand(32, 1, 1) + 0.5
    model.scale.layer_scale = layer_scale if kind == "no buffer" else nn.Parameter(layer_scale)
    WEIGHTS[kind](model.child)
    if before:
        with torch.no_grad():
            model(image(2, 16))
    with contextlib.suppress(se_inject.SEInjectError):  # a refusal is right, too
        check(model)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["autocast", "half", "half first"])
def test_sums_over_positions_do_not_overflow_in_float16(kind):
    model, x = net(lambda m, x: m.wide_se(m.wide(m.stem(x)))), image(2, 96) + 40  # the means do not overflow
    exact = copy.deepcopy(model).double()(x.double())
    if kind == "half first":
        model.half()
    fast = se_inject.optimize_for_inference(model, input_size=(3, 96, 96))
    if kind == "autocast":
        with torch.autocast("cpu", torch.float16):
            plain, out = model(x), fast(x)
    else:
        plain, out = model.half()(x.half()), fast.half()(x.half())
    assert plain.isfinite().all() and out.isfinite().all()
    assert deviation(exact, plain) < 5e-3 and deviation(exact, out) < 5e-3


@torch.no_grad()
def test_a_sequential_keeps_its_members():
    model = randomise(torchvision.models.mobilenet_v3_small(num_classes=5)).eval()
    fast = check(model, (64,))
    plain, block, x = model.features[1].block, fast.features[1].block, torch.randn(2, 16, 16, 16)
    assert len(block) == len(plain) == 3
    assert list(block) == [block[i] for i in range(3)] == list(block.children())
    assert isinstance(block[0], type(plain[0])) and len(block[:1]) == 1 and len(block[1:]) == 2
    assert deviation(plain[:1](x), block[:1](x)) < 1e-5


@cases({
    "twice": lambda m, x: m.se2(m.se(m.stem(x))),
    "identity between": lambda m, x: m.se2(m.identity(m.se(m.stem(x)))),
    "in a sum": lambda m, x: last(y := m.stem(x), y + m.point(m.se2(m.identity(m.se(y))))),
    "behind a block": lambda m, x: last(y := m.identity(m.se(m.stem(x))), y + m.wide_se(m.wide(y)).sum(1, keepdim=True)),
})
def test_blocks_in_a_row(case):
    check(net(*case, se2=SE(8), identity=nn.Identity()))


@pytest.mark.parametrize("shaped", [
    lambda y: y.unsqueeze(-1).unsqueeze(-1), lambda y: y[:, :, None, None], lambda y: y.view(-1, 64, 1, 1),
    lambda y: y.reshape(y.shape[0], 64, 1, 1)], ids=["unsqueeze", "index", "view", "reshape"])
def test_a_block_on_vectors(shaped):
    check(net(lambda m, x: m.child(shaped(m.fc(m.stem(x).mean((2, 3))))), SE(64, 8), fc=nn.Linear(8, 64)))


class Gate(nn.Module):
    """A block whose gate ends in this activation."""

    def __init__(self, act):
        super().__init__()
        self.a, self.b, self.act = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), act

    def forward(self, x):
        return x * self.act(self.b(self.a(x.mean((2, 3), keepdim=True)).relu()))


@cases({
    "two": nn.Sequential(nn.Softplus(), nn.Tanh()),
    "sigmoid of another": net(lambda m, x: torch.sigmoid(x.clamp(-0.3, 0.3))),
    "relu of another": net(lambda m, x: 2.0 * torch.relu(x.clamp(-1, 0.3))),
    "number times another": net(lambda m, x: (F.relu6(x + 3) / 6) * 2.0),
    "with a flag of its own": net(lambda m, x: x.sigmoid() if m.inplace else x.tanh()),
})
def test_activations_of_a_gate(case):
    (act,) = copy.deepcopy(case)
    act.inplace = False
    check(net(lambda m, x: m.child(m.stem(x)), Gate(act)))


@cases({
    "linear": lambda m, x: x * m.one(x.mean((2, 3)).unsqueeze(-1)).sigmoid().unsqueeze(-1),
    "convolution": lambda m, x: x * m.across(x.mean((2, 3)).unsqueeze(1)).sigmoid().transpose(1, 2).unsqueeze(-1),
})
def test_a_layer_of_a_gate_on_another_axis_than_the_channels(case):
    check(net(lambda m, x: m.child(m.stem(x)), net(*case, one=nn.Linear(1, 1), across=nn.Conv1d(1, 1, 1))))


class OwnNorm(nn.BatchNorm2d):
    def normed(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


def own_norm(forward):
    return type("Norm", (OwnNorm,), {"forward": forward})(8)


def own_conv(forward):
    return type("Conv", (nn.Conv2d,), {"forward": forward})(3, 8, 3, padding=1, bias=False)


def without_bias(conv):
    del conv.bias
    conv.bias = None
    return conv


@cases({
    "reads no bias": own_conv(lambda m, x: F.conv2d(x, m.weight, padding=1)),
    "adds a bias": own_conv(lambda m, x: F.conv2d(x, m.weight, padding=1) + (0 if m.bias is None else m.bias.sum())),
    "has no place for a bias": without_bias(nn.Conv2d(3, 8, 3, padding=1)),
})
def test_a_layer_that_takes_no_bias_keeps_its_norm(case):
    fast = check(net(lambda m, x: m.norm(m.child(x)), *case))
    assert not fast.se_report.norms_folded


def test_a_layer_that_computes_its_call_takes_a_bias():
    fast = check(net(lambda m, x: m.norm(m.child(x)), own_conv(lambda m, x: F.conv2d(x, m.weight, m.bias, padding=1))))
    assert fast.se_report.norms_folded == {"norm": "child"}


# (forward, its child, why the norm stays)
@cases({
    "nested": (lambda m, x: last(y := m.stem(x), t := m.child(y), m.norm(y) + t[0][0]), lambda m, x: ([x * 2], [x]), "where"),
    "nothing": (lambda m, x: last(y := m.stem(x), m.child(y), m.norm(y)), lambda m, x: None, "elsewhere"),
    "attribute": (lambda m, x: last(setattr(m, "kept", y := m.stem(x)), m.norm(y)), None, "sets attributes"),
    "attribute of a child": (lambda m, x: m.norm(m.child(x)) + m.child.kept, own_conv(
        lambda m, x: last(setattr(m, "kept", F.conv2d(x, m.weight, padding=1)), m.kept)), ""),
    "attribute of the norm": (lambda m, x: m.child(m.stem(x)) + m.child.kept, own_norm(
        lambda m, x: last(setattr(m, "kept", x), m.normed(x))), ""),
    "argument of an activation": (lambda m, x: m.child(m.stem(x)), own_norm(lambda m, x: m.act(m.normed(x), 0.1)), "more than"),
    "second argument": (lambda m, x: m.child(m.stem(x), True), own_norm(lambda m, x, flag: m.normed(x)), "more than"),
    "tuple": (lambda m, x: m.child(m.stem(x))[0], own_norm(lambda m, x: (m.normed(x),)), "more than"),
    "not used": (lambda m, x: m.child(m.stem(x)), own_norm(lambda m, x: last(m.normed(x), x * 2)), "more than"),
})
def test_a_norm_that_has_to_stay(case):
    forward, child, why = case
    model = net(forward, copy.deepcopy(child))
    if isinstance(child, OwnNorm):
        model.child.act = net(lambda m, x, k=1: x.clamp(-k, k))
    fast = check(model)
    assert not fast.se_report.norms_folded
    assert any(why in reason for reason in fast.se_report.norms_kept.values())


@cases({
    "class": lambda m, x: last(y := m.stem(x), m.norm(y) if isinstance(m.norm, nn.BatchNorm2d) else y * 2),
    "attribute": lambda m, x: m.norm(m.stem(x)) * (1e5 * m.norm.eps if hasattr(m.norm, "eps") else 1),
    "by name": lambda m, x: m.norm(input=m.stem(x)),
    "children": lambda m, x: last(y := m.stem(x), [y := c(y) for c in m.children() if isinstance(c, nn.BatchNorm2d)], y),
})
def test_a_folded_norm_keeps_its_class(case):
    fast = check(net(*case))
    assert fast.se_report.norms_folded == {"norm": "stem"}
    assert isinstance(fast.norm, nn.BatchNorm2d) and str(fast.norm) == "BatchNorm2d(folded)"
    assert not any(key.startswith("norm.") for key in fast.state_dict())
    fast.load_state_dict({k: v.clone() for k, v in fast.state_dict().items()}, strict=True)


@pytest.mark.parametrize("act", [
    lambda m, x: last(x.mul_(0.5), x.relu_(), x), lambda m, x: x * m.gain, lambda m, x: x if x.shape[-1] > 20 else x.tanh()],
    ids=["in place", "parameter", "branches"])
def test_activations_of_a_folded_norm(act):
    child = own_norm(lambda m, x: m.act(m.normed(x)))
    child.act = net(act)
    fast = check(net(lambda m, x: m.child(m.stem(x)) + m.other(x), child))
    assert fast.se_report.norms_folded == {"child": "stem"}


def test_a_forward_that_asks_for_the_bias_of_a_layer_is_refused():
    model = net(lambda m, x: m.norm(m.child(x)) * (2 if m.child.bias is None else 1), nn.Conv2d(3, 8, 3, bias=False))
    with pytest.raises(se_inject.SEInjectError, match=r"the model runs .* once batch norms are folded"):
        se_inject.optimize_for_inference(model, input_size=(3, 16, 16))


@pytest.mark.parametrize("name", ["seresnet18", "test_resnet"])
def test_a_graph_module_takes_gradients_and_autocast(name):
    model = torch.fx.symbolic_trace(randomise(timm.create_model(name)).eval())
    fast, grads = check(model, (32, 64)), []
    for m in (model, fast):
        x = image(1, 32).requires_grad_()
        m(x).sum().backward()
        grads.append(x.grad)
    assert deviation(*grads) < 1e-4
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert deviation(model(image(2, 32)), fast(image(2, 32))) < 0.1


@pytest.mark.parametrize("groups, channels, bias", [(8, 8, False), (2, 16, True), (4, 16, False), (1, 16, True)])
def test_a_norm_behind_a_transposed_convolution(groups, channels, bias):
    conv = nn.ConvTranspose2d(8, channels, 3, stride=2, groups=groups, bias=bias)
    check(net(lambda m, x: m.after(m.child(m.stem(x))), conv, after=nn.BatchNorm2d(channels)))


@pytest.mark.parametrize("where", ["model", "child"])
def test_a_forward_of_an_instance_is_the_one_that_counts(where):
    model = net(lambda m, x: m.child(m.stem(x)), lambda m, x: x + m.se(m.point(x)))
    if where == "model":
        model.forward = types.MethodType(lambda m, x: m.child(m.stem(x)) - m.wide_se(m.wide(m.stem(x))).sum(1, True), model)
    else:
        model.child.forward = types.MethodType(lambda m, x: x - m.se(m.point(x)), model.child)
    check(model)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_gradients_and_autocast_take_the_authors_forward(name):
    model = randomise(se_inject.inject(timm.create_model(name))).eval()
    fast, grads = se_inject.optimize_for_inference(model), []
    for m in (model, fast):
        x = image(1, 160).requires_grad_()
        m(x).sum().backward()
        grads.append(x.grad)
    assert deviation(*grads) < 1e-4
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(image(2, 160).double())
        with torch.autocast("cpu", torch.bfloat16):
            assert deviation(exact, fast(image(2, 160))) < 2 * deviation(exact, model(image(2, 160)))
            block = next(m for m in fast.modules() if hasattr(type(m), "_se_plain") and m is not fast)
            args = []
            block.register_forward_pre_hook(lambda _, given: args.extend(given))
            fast(image(2, 160))
            assert block(args[0]).dtype == type(block)._se_plain(block, args[0]).dtype


@torch.no_grad()
def test_a_forward_of_an_instance_with_timms_other_methods():
    model = randomise(timm.create_model("test_resnet")).eval()
    model.forward = types.MethodType(lambda m, x: last(h := m.conv1(x), m.bn1(h).mean((2, 3)) + h.mean((2, 3))), model)
    x = image(2, 32)
    assert deviation(model(x), se_inject.optimize_for_inference(model)(x)) < 1e-5


def test_a_copy_inside_another_model_is_refused():
    model = nn.Sequential(se_inject.optimize_for_inference(timm.create_model("test_resnet")))
    for call in (se_inject.optimize_for_inference, se_inject.inject):
        with pytest.raises(se_inject.SEInjectError, match="optimized for inference"):
            call(model, input_size=(3, 64, 64))


class Gating(SE):
    """A gate of which statements change values in place."""

    def __init__(self, body):
        super().__init__(8)
        self.act = nn.ReLU(inplace=True)
        self.body = body

    def forward(self, x):
        return self.body(self, x, x.mean((2, 3), keepdim=True))


@cases({
    "layer": lambda m, x, v: last(s := m.a(v), m.act(s), x * m.b(s).sigmoid()),
    "relu_": lambda m, x, v: last(s := m.a(v), s.relu_(), x * m.b(s).sigmoid()),
    "sigmoid_": lambda m, x, v: last(g := m.b(m.a(v).relu()), g.sigmoid_(), x * g),
    "mean": lambda m, x, v: last(v.mul_(2.0), x * m.b(m.a(v).relu()).sigmoid()),
    "clamp_": lambda m, x, v: last(g := m.b(m.a(v).relu()).sigmoid(), g.mul_(2).clamp_(0.4, 0.6), x * g),
    "view": lambda m, x, v: last(g := m.b(m.a(v).relu()).sigmoid(), g.flatten().mul_(0.5), x * g),
    "no layers": lambda m, x, v: last(g := v.sigmoid(), g.mul_(2).clamp_(0.9, 1.1), x * g),
    "input": lambda m, x, v: last(g := m.b(m.a(v).relu()).sigmoid(), x.mul_(2), x * g),
    "size": lambda m, x, v: x * m.b(torch.tanh(m.a(v)) * v.dim()).sigmoid(),
})
def test_gates_that_are_changed_in_place(case):
    check(net(lambda m, x: m.act(m.child(m.norm(m.stem(x)))), Gating(*case)))


def test_a_gate_whose_activation_asks_for_a_size():
    gate = Gating(lambda m, x, v: x * m.b(m.sized(m.a(v))).sigmoid())
    gate.sized = net(lambda m, x: torch.tanh(x) * x.shape[-1])
    check(net(lambda m, x: m.child(m.norm(m.stem(x))), gate))


class Changed(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.fc = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        g = torch.sigmoid(self.fc(x.mean((2, 3), keepdim=True)))
        g.mul_(2).clamp_(0.9, 1.1)
        return x * g


def test_gates_are_measured_with_what_changes_them_in_place(monkeypatch):
    monkeypatch.setitem(catalogue._rows, "changed", catalogue.Block("changed", Changed))
    model = randomise(se_inject.inject(timm.create_model("test_resnet"), block="changed", init="timm")).eval()
    found = se_inject.gates(model, [image(4, 64)])
    assert len(found.sites) == 4 and all(s.mean.min() > 0.8999 and s.mean.max() < 1.1001 for s in found.sites)


class Standardized(nn.Conv2d):
    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        w.div_(w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias)


def test_weights_that_are_changed_in_place():
    for child in (
            Standardized(8, 32, 1), lambda m, x: last(g := m.gain.exp(), g.clamp_(max=1.0), m.wide(m.point(x)) * g.sum())):
        check(net(lambda m, x: m.wide_se(m.after(m.child(m.point(m.stem(x))))), child, after=nn.BatchNorm2d(32)))


class Tied(Parts):
    """Its norms follow layers whose weights other operators read: where a trace does not see it, or cannot be made."""

    def __init__(self, read):
        super().__init__()
        self.hidden, self.read, self.steps = [self.point], read, 0

    def forward(self, x):
        self.steps += 1
        return self.read(self, self.norm(self.point(self.stem(x))))


@cases({
    "weight": lambda m, x: F.conv_transpose2d(x, m.point.weight),
    "list": lambda m, x: F.conv_transpose2d(x, m.hidden[0].weight),
    "parameters": lambda m, x: x + sum(p.square().sum() for p in m.parameters()) * 1e-3,
    "state dict": lambda m, x: x * m.state_dict()["point.weight"].abs().sum(),
    "statistics": lambda m, x: x * m.norm.running_var.mean().detach(),
})
def test_weights_that_another_operator_reads(case):
    assert not check(randomise(Tied(*case)).eval()).se_report.norms_folded


@cases({
    "permuted": lambda m, x: last(
        y := m.stem(x), z := y + m.linear(m.point(y).permute(0, 2, 3, 1)).permute(0, 3, 1, 2), z),
    "part": lambda m, x: m.wide(m.stem(x))[:, :8] * m.gain,
    "sum of parts": lambda m, x: m.wide(m.stem(x))[:, :8] + m.stem(x),
})
def test_results_have_the_strides_of_the_authors(case):
    model = net(*case)
    fast = check(model)
    assert model(image(2, 16)).stride() == fast(image(2, 16)).stride()


@pytest.mark.parametrize("pair", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
def test_a_gate_in_another_dtype_than_its_map(pair):
    model = net(lambda m, x: m.child(m.norm(m.stem(x))), Gating(
        lambda m, x, v: x * m.b(m.a(v.to(m.a.weight.dtype)).relu()).sigmoid().to(x.dtype)))
    model.to(pair[0]).child.to(pair[1])
    fast, x = se_inject.optimize_for_inference(model, input_size=(3, 16, 16)), image(2, 16).to(pair[0])
    with torch.no_grad():
        assert deviation(model(x), fast(x)) < 1e-2


def test_every_input_is_asked_for_gradients_and_autocast():
    def pyramid(m, maps):
        return [maps[0] + m.norm(m.point(maps[0])), maps[1] + m.point(maps[1])]

    masked = net(lambda m, x: m.child(m.gain.detach(), m.stem(x)), net(lambda m, k, x: x * k + m.se(m.point(x))))
    listed = net(lambda m, x: last(y := m.stem(x), torch.stack(m.child([y, y * 2]))), net(pyramid))
    for model in (masked, listed):
        fast, grads = check(model), []
        for m in (model, fast):
            x = image(1, 16).requires_grad_()
            m(x).sum().backward()
            grads.append(x.grad)
        assert deviation(*grads) < 1e-4
        x = image(2, 16)
        with torch.no_grad():
            with torch.autocast("cpu", torch.bfloat16):
                assert fast(x).dtype == model(x).dtype and deviation(model(x), fast(x)) < 0.02
            images = x[:, None]
            assert deviation(torch.func.vmap(model)(images), torch.func.vmap(fast)(images)) < 1e-4
            assert deviation(*(torch.func.jvp(m, (x,), (x,))[1] for m in (model, fast))) < 1e-4


def test_what_a_function_that_a_module_holds_keeps():
    model, kept = net(lambda m, x: last(y := m.stem(x), m.tap(y), y + m.se(m.point(y)))), []
    model.tap = kept.append
    for tap in (kept.append, lambda t: kept.append(t)):
        model.tap = tap
        fast = se_inject.optimize_for_inference(model, input_size=(3, 16, 16))
        assert not kept
        fast(image(1, 16))
        assert len(kept) == 1 and type(kept.pop()) is torch.Tensor
