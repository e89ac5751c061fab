"""The operators that a squeeze moves through, those that stop it, and the gates that become layers on vectors."""

import torch
from torch import nn

from ..support.versions import needs_arange_in_traces
from .test_hazards import SE, cases, check, last, net


class Gated(nn.Module):
    """A block with this gate."""

    def __init__(self, gate):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(32, 4, 1), nn.Conv2d(4, 32, 1), nn.Conv2d(32, 32, 1)
        self.act, self.p = nn.Hardswish(), nn.Parameter(torch.rand(1, 32, 1, 1))
        self.gate = gate

    def forward(self, x):
        return x * self.gate(self, x)


def two(m, x):
    """A tensor with two channels: squeezed, it is the cheapest of those before `wide_se`, which has 32."""
    return m.down(m.stem(x))


def block(forward, child=None):
    model = net(forward, child, down=nn.Conv2d(8, 2, 1), up=nn.Conv2d(2, 8, 1), grouped=nn.Conv2d(2, 8, 1, groups=2),
                same=nn.Conv2d(8, 8, 3, padding=1), out=nn.Linear(8, 32))
    (report,) = check(model).se_report.blocks
    return report


@cases({
    "convolutions": lambda m, x: m.wide_se(m.wide(m.up(two(m, x)))),
    "groups": lambda m, x: m.wide_se(m.wide(m.grouped(two(m, x)))),
    "folded norm": lambda m, x: m.wide_se(m.wide(m.norm(m.up(two(m, x))))),
    "norm that stays": lambda m, x: last(
        y := m.up(two(m, x)), m.wide_se(m.wide(m.norm(y))).sum(1, keepdim=True) + y.cos().sum(1, keepdim=True)),
    "scale and shift": lambda m, x: m.wide_se(m.wide(m.gain + m.up(two(m, x)) * m.gain * 0.5)),
    "dropout": lambda m, x: m.wide_se(nn.functional.dropout(m.wide(m.up(two(m, x))), 0.5, m.training)),
    "linear layer in another layout": lambda m, x: m.wide_se(m.out(m.up(two(m, x)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)),
    "tokens": lambda m, x: m.wide_se(
        m.out(m.up(two(m, x)).flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])),
    "another forward": (lambda m, x: m.wide_se(m.wide(m.child(x))), lambda m, x: m.up2(m.down2(m.stem(x)))),
})
def test_the_squeeze_moves_through(case):
    forward, child = (*case, None)[:2]
    if child is not None:
        child = net(child, down2=nn.Conv2d(8, 2, 1), up2=nn.Conv2d(2, 8, 1))
    report = block(forward, child)
    assert report.moved and report.channels == 2


# (forward, forward of its child, part of the reason)
@cases({
    "wider input": (lambda m, x: m.se(m.down8(m.wide(m.stem(x)))), None, "no tensor before it is cheaper"),
    "convolution": (lambda m, x: m.se(m.same(m.up(two(m, x)))), None, "conv2d in same is not linear over channels alone"),
    "activation": (lambda m, x: m.se(m.up(two(m, x)).relu()), None, "relu is not linear over channels alone"),
    "position embedding": (
        lambda m, x: m.se(m.up(two(m, x)) + torch.arange(x.shape[3]) * 0.1), None, "add is not linear over channels alone"),
    "list": (lambda m, x: m.wide_se(m.wide(m.child([two(m, x)]))), lambda m, xs: m.up2(xs[0].add(1)), "takes a list"),
}, {"position embedding": needs_arange_in_traces})
def test_the_squeeze_stays(case):
    forward, child, reason = case
    if child is not None:
        child = net(child, up2=nn.Conv2d(2, 8, 1))
    model = net(forward, child, down=nn.Conv2d(8, 2, 1), up=nn.Conv2d(2, 8, 1), down8=nn.Conv2d(32, 8, 1),
                same=nn.Conv2d(8, 8, 3, padding=1))
    (report,) = check(model).se_report.blocks
    assert not report.moved and reason in report.reason


def mean(x):
    return x.mean((2, 3), keepdim=True)


# (gate, its layers), or (gate, part of the reason why there are none)
@cases({
    "linear layers in a row": (lambda m, x: m.b(m.a(mean(x))).sigmoid(), ["weight1", "sigmoid_"]),
    "module": (lambda m, x: m.b(m.act(m.a(mean(x)))).sigmoid() * 2, ["weight1", "act1", "weight2", "sigmoid_", 2.0]),
    "number first": (lambda m, x: 0.5 * m.c(mean(x)).relu(), ["weight1", "relu_", 0.5]),
    "pool": (lambda m, x: m.c(nn.functional.adaptive_avg_pool2d(x, 1)).sigmoid(), ["weight1", "sigmoid_"]),
    "activation first": (lambda m, x: m.c(mean(x).relu()).sigmoid(), ["relu_", "weight1", "sigmoid_"]),
    "function of another kind": (lambda m, x: m.c(mean(x)).exp(), "exp is neither a linear layer, nor relu"),
    "mean of another value": (lambda m, x: m.c(mean(x.abs())).sigmoid(), "its squeeze reads abs"),
    "mean of means": (lambda m, x: m.c(x.mean(2, keepdim=True).mean(3, keepdim=True)).sigmoid(), "its squeeze reads mean"),
    "number inside": (lambda m, x: (m.c(mean(x)) * 0.5).sigmoid(), "mul is neither a linear layer, nor relu"),
    "parameter": (lambda m, x: m.c(mean(x)).sigmoid() + m.p, "add is neither a linear layer, nor relu"),
})
def test_gates(case):
    gate, expected = case
    model = net(lambda m, x: m.gated(m.wide(m.stem(x))), gated=Gated(gate))
    fast = check(model)
    (report,) = fast.se_report.blocks
    made = fast.gated.optimized
    if isinstance(expected, str):
        assert expected in report.reason and isinstance(made, torch.fx.GraphModule)
    else:
        assert made.steps == expected


def test_a_block_in_a_forward_that_cannot_be_rewritten_stays():
    model = net(lambda m, x: m.child(m.stem(x)) + m.child(m.other(x)), lambda m, x: m.se(m.point(x)))
    assert {b.reason for b in check(model).se_report.blocks} == {"it is called more than once"}
    model = net(lambda m, x: m.se(m.norm(x) if x.shape[-1] > 20 else x), stem=nn.Identity(), se=SE(3), norm=nn.BatchNorm2d(3))
    (report,) = check(model).se_report.blocks
    assert report.source is None and "its owner is left alone: Net.forward branches on sizes" in report.reason
