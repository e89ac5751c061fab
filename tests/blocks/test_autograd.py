"""Squeeze, scale and shift in a training step: values and gradients of the plain expressions, with fewer saved maps."""

import copy
import weakref

import pytest
import timm
import torch
import torch.utils.checkpoint
from torch import nn
from torch.autograd import forward_ad

import se_inject
from se_inject.blocks import autograd
from se_inject.blocks.film import ScaleAndShift
from se_inject.blocks.squeeze_excite import SqueezeExcite
from se_inject.private import SEES_SAVED_TENSORS_HOOKS

from ..support.versions import needs_norms_computed_again

LAYOUTS = [("NCHW", (2, 8, 6, 5)), ("NHWC", (2, 6, 5, 8)), ("NLC", (2, 30, 8))]


@pytest.fixture
def small(monkeypatch):
    """Small maps take the branch of large maps."""
    monkeypatch.setattr(autograd, "MIN_NUMEL", 0)


@pytest.fixture(params=[SqueezeExcite, ScaleAndShift])
def block(request):
    def make(layout, dtype=torch.float32):
        torch.manual_seed(0)
        return request.param(8, 4, layout, gain=2.0, act_layer="silu", dtype=dtype)

    return make


def gradients(module, x, monkeypatch, plain):
    with monkeypatch.context() as patch:
        if plain:
            patch.setattr(autograd, "DEVICES", ())
        x = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = module(x)
        module.zero_grad()
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        return y.detach(), [x.grad, *(p.grad.clone() for p in module.parameters())]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("layout", "shape"), LAYOUTS)
def test_values_are_equal_and_gradients_those_of_the_plain_expression(block, layout, shape, channels_last, small, monkeypatch):
    x = torch.randn(shape)
    if channels_last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    module = block(layout)
    y, mine = gradients(module, x, monkeypatch, False)
    expected, theirs = gradients(module, x, monkeypatch, True)
    assert torch.equal(y, expected)
    for a, b in zip(mine, theirs, strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("layout", "shape"), LAYOUTS)
def test_gradients_and_gradients_of_gradients_are_right(block, layout, shape, small):
    module = block(layout, torch.float64)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (x,))
    assert torch.autograd.gradgradcheck(module, (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("layout", "shape"), LAYOUTS)
def test_the_squeeze_is_the_mean_to_the_bit(block, layout, shape, dtype, small, monkeypatch):
    monkeypatch.setattr(autograd, "PART", 1 << 10)
    dims = block(layout).dims
    x = torch.randn([n * 7 for n in shape]).to(dtype).requires_grad_()
    y = autograd.squeeze(x, dims)
    assert type(y.grad_fn).__name__ == "_SqueezeBackward"
    assert torch.equal(y, x.mean(dims, keepdim=True))


def test_the_function_runs_where_gradients_are_needed(block, small):
    x = torch.randn(2, 8, 6, 5, requires_grad=True)
    assert type(block("NCHW")(x).grad_fn).__name__ == "_ScaleBackward"
    gate = torch.ones(2, 8, 1, 1, requires_grad=True)
    assert type(autograd.scale(x.detach(), gate, [2, 3]).grad_fn).__name__ == "MulBackward0"
    with torch.no_grad():
        assert block("NCHW")(x).grad_fn is None


class Normed(nn.Sequential):
    """A block after a batch norm, as in a bottleneck."""

    def __init__(self, block, dtype=torch.float32):
        torch.manual_seed(1)
        super().__init__(nn.Conv2d(3, 8, 3, bias=False, dtype=dtype), nn.BatchNorm2d(8, dtype=dtype), block("NCHW", dtype))
        nn.init.uniform_(self[1].weight, 0.5, 1.5)
        nn.init.uniform_(self[1].bias, -0.5, 0.5)


def freed(model, x):
    """Whether the input of the block is freed before the backward."""
    seen = []
    model[2].register_forward_pre_hook(lambda _, given: seen.append(weakref.ref(given[0])))
    y = model(x)
    gone = seen[0]() is None
    y.sum().backward()
    return gone


@needs_norms_computed_again
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_output_of_a_norm_is_computed_again(block, layout, dtype, small, monkeypatch):
    model = Normed(block).to(memory_format=layout)
    x = torch.randn(4, 3, 11, 9).contiguous(memory_format=layout)
    grads = []
    for has_norm in (True, False):
        if not has_norm:
            monkeypatch.setattr(autograd, "_norm_of", lambda x: None)
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            y = model(x)
        assert type(y.grad_fn).__name__ == ("_ScaleOfNormBackward" if has_norm else "_ScaleBackward")
        model.zero_grad()
        (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    close(*grads, 1e-5 if dtype is torch.float32 else 2e-2)


def close(mine, theirs, most):
    for a, b in zip(mine, theirs, strict=True):
        assert (a - b).norm() <= most * b.norm()


@needs_norms_computed_again
def test_the_output_of_a_norm_is_not_saved(block, small):
    x = torch.randn(2, 3, 8, 8)
    assert freed(Normed(block), x)
    frozen, still = Normed(block), Normed(block)
    frozen[1].bias.requires_grad_(False)
    still[1].eval()
    assert not freed(frozen, x) and not freed(still, x)  # their nodes do not save what x is computed from
    model = Normed(block)
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    close([p.grad for p in model.parameters()], expected, 1e-5)


def test_gradients_of_gradients_after_a_norm(block, small):
    model = Normed(block, torch.float64)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model, (x,))
    assert torch.autograd.gradgradcheck(model, (x,))
    weights = tuple(model[1].parameters())
    assert torch.autograd.gradgradcheck(lambda *w: torch.func.functional_call(
        model, dict(zip(("1.weight", "1.bias"), w)), (x.detach(),)), weights)


@needs_norms_computed_again
def test_gradients_of_the_gradient_of_a_map_itself(small, monkeypatch):
    """The map is computed again from what the norm saves, and is a function of itself all the same."""
    norm, z = nn.BatchNorm2d(4).double(), torch.randn(3, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 4, dtype=torch.float64)

    def found():
        x = norm(z)
        gate = (autograd.squeeze(x, [2, 3]).flatten(1) @ w).sigmoid()[:, :, None, None]
        (g,) = torch.autograd.grad(autograd.scale(x, gate, [2, 3]).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), (x, z, norm.weight))

    mine = found()
    monkeypatch.setattr(autograd, "DEVICES", ())
    torch.testing.assert_close(mine, found())


def test_a_tangent_of_the_shift_alone(small):
    x, gate, shift = torch.randn(2, 4, 5, 5, requires_grad=True), torch.rand(2, 4, 1, 1), torch.randn(2, 4, 1, 1)
    with forward_ad.dual_level():
        y = autograd.scale(x, gate, [2, 3], forward_ad.make_dual(shift, torch.ones_like(shift)))
        assert torch.equal(forward_ad.unpack_dual(y).tangent, torch.ones_like(x))


def test_autocast(block, small, monkeypatch):
    module = block("NCHW")
    x = torch.randn(2, 8, 6, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y, mine = gradients(module, x, monkeypatch, False)
        expected, theirs = gradients(module, x, monkeypatch, True)
    assert torch.equal(y, expected)
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*is deprecated:FutureWarning")  # torch.func raises it
def test_batches_of_gradients(block, small):
    module = block("NCHW")
    x = torch.randn(2, 8, 6, 5)

    def loss(x):
        return module(x.unsqueeze(0)).square().sum()

    one = torch.stack([torch.func.grad(loss)(i) for i in x])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x), one)
    _, tangent = torch.func.jvp(loss, (x[0],), (torch.ones_like(x[0]),))
    torch.testing.assert_close(tangent, one[0].sum(), rtol=1e-4, atol=1e-4)
    x.requires_grad_()
    y = module(x)
    basis = torch.eye(4).view(4, 1, 4, 1, 1).expand(4, 2, 4, 6, 5).repeat(1, 1, 2, 1, 1)
    batched = torch.autograd.grad(y, x, basis, retain_graph=True, is_grads_batched=True)[0]
    for b, g in zip(basis, batched):
        torch.testing.assert_close(torch.autograd.grad(y, x, b, retain_graph=True)[0], g)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*is deprecated:FutureWarning")
def test_compilers_and_scripts_get_the_plain_expression(block, small):
    module = block("NCHW")
    x = torch.randn(2, 8, 6, 5, requires_grad=True)
    expected = module(x)
    for other in (torch.compile(module, fullgraph=True, backend="aot_eager"), torch.jit.script(copy.deepcopy(module)),
                  torch.export.export(module, (x,)).module(), torch.fx.symbolic_trace(module)):
        y = other(x)
        torch.testing.assert_close(y, expected)
        y.sum().backward()


def test_a_step_of_an_injected_model_equals_a_step_of_its_native_twin():
    torch.manual_seed(0)
    native = timm.create_model("seresnet50", num_classes=3)
    mine = se_inject.inject(timm.create_model("resnet50", num_classes=3), init="timm")
    mine.load_state_dict(native.state_dict())
    x = torch.randn(4, 3, 96, 96)
    kinds = set()

    def see(module, args, output):
        kinds.add(type(output.grad_fn).__name__)

    for m in mine.modules():
        if isinstance(m, SqueezeExcite):
            m.register_forward_hook(see)
    a, b = mine(x), native(x)
    assert torch.equal(a, b)
    large = "_ScaleOfNormBackward" if SEES_SAVED_TENSORS_HOOKS else "_ScaleBackward"
    assert kinds == {large, "MulBackward0"}  # large maps, and small maps
    for y in (a, b):
        nn.functional.cross_entropy(y, torch.tensor([0, 1, 2, 0])).backward()
    for (name, p), q in zip(mine.named_parameters(), native.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= 1e-3 * q.grad.norm() + 1e-6, name
