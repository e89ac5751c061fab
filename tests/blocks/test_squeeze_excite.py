"""The blocks compute their formulas, with a width that is never zero."""

from __future__ import annotations

import pytest
import torch

import se_inject
from se_inject.blocks.catalogue import get_block
from se_inject.blocks.film import ScaleAndShift
from se_inject.blocks.identity import make_identity
from se_inject.blocks.squeeze_excite import SqueezeExcite

from ..support.toys import Net
from ..support.units import (
    Residual,
)


@pytest.mark.parametrize("channels", [1, 2, 3, 8, 24])
def test_squeeze_width_is_never_zero(channels):
    from se_inject.blocks.build import block_spec
    from se_inject.config import SEConfig

    assert block_spec(SEConfig(ratio=0.001, rd_divisor=1), channels, channels, "NCHW", "se").rd_channels == 1
    assert block_spec(SEConfig(), channels, channels, "NCHW", "se").rd_channels >= 1


@pytest.mark.parametrize("kind", [SqueezeExcite, ScaleAndShift])
@pytest.mark.parametrize("layout, shape", [("NCHW", (2, 8, 4, 4)), ("NHWC", (2, 4, 4, 8)), ("NLC", (2, 16, 8))])
def test_the_block_computes_its_formula(kind, layout, shape):
    block = kind(8, 4, layout)
    x = torch.randn(shape)
    dim = 1 if layout == "NCHW" else len(shape) - 1
    z = x.movedim(dim, -1).flatten(1, -2).mean(1)
    w1, w2 = block.fc1.weight.flatten(1), block.fc2.weight.flatten(1)
    hidden = torch.relu(z @ w1.T + block.fc1.bias)
    gate = torch.sigmoid(hidden @ w2.T + block.fc2.bias)
    view = [2] + [1] * (len(shape) - 1)
    view[dim] = 8
    expected = x * gate.view(view)
    if kind is ScaleAndShift:
        s = hidden @ block.shift.weight.flatten(1).T + block.shift.bias
        shift = torch.tanh(0.4 * s) * z.abs().mean(1, keepdim=True) / 4
        expected = expected + shift.view(view)
        assert shift.abs().min() > 0
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("layout, shape", [("NCHW", (2, 8, 4, 4)), ("NHWC", (2, 4, 4, 8)), ("NLC", (2, 16, 8))])
@pytest.mark.parametrize("bias", [True, False])
def test_scale_and_shift_start_as_an_identity_and_learn(layout, shape, bias):
    """Also on zeros of both signs and on a map of zeros; both last layers have a gradient at once, the first after a step."""
    block = ScaleAndShift(8, 4, layout, bias)
    make_identity(get_block("film").start, block)
    x = torch.randn(shape).requires_grad_()
    for y in (x, torch.zeros(shape), -torch.zeros(shape), torch.full(shape, 1e30), torch.full(shape, 1e-42)):
        assert torch.equal(block(y), y)
    zeros = torch.zeros(shape, requires_grad=True)
    block(zeros).sum().backward()
    assert torch.equal(zeros.grad, torch.ones(shape))
    block.zero_grad()
    weight = torch.randn(shape)
    (block(x) * weight).sum().backward()
    assert torch.equal(x.grad, weight)
    assert all(p.grad.abs().sum() > 0 for p in (*block.fc2.parameters(), *block.shift.parameters()))
    torch.optim.SGD(block.parameters(), lr=1e-2).step()
    block.zero_grad()
    (block(x) * weight).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in block.parameters())


def test_a_shift_scales_with_the_map_and_is_bounded_by_its_means():
    block = ScaleAndShift(8, 4, bias=False)
    for p in block.parameters():
        torch.nn.init.normal_(p, std=1e4)
    x = torch.rand(2, 8, 4, 4) - 0.5
    with torch.no_grad():
        torch.testing.assert_close(block(x * 1e3), block(x) * 1e3)
        gated = x * block.gate(block.fc2(block.act(block.fc1(x.mean((2, 3), keepdim=True)))))
        off = (block(x) - gated).abs().amax((2, 3))
    assert (off <= x.mean((2, 3)).abs().mean(1, keepdim=True) * 1.001).all() and off.max() > 0


@pytest.mark.parametrize("gate", ["tanh", "relu"])
def test_a_gate_that_cannot_start_as_identity_is_refused(gate):
    with pytest.raises(se_inject.SEInjectError, match="gate_layer"):
        se_inject.inject(Net(Residual()), input_size=(3, 8, 8), gate_layer=gate)
