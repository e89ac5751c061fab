"""The block computes the paper's formula, with a width that is never zero."""

from __future__ import annotations

import pytest
import torch

import se_inject
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
