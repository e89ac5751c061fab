"""Units that carry their own expected result: a residual, an aggregation, or no place for a block."""

from __future__ import annotations

import torch
from torch import nn

from .toys import conv


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


class Reparameterized(Toy):
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


class Encoded(Toy):
    def forward(self, x):
        return self.c(x + self.b(x))
