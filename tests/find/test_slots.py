"""Empty slots: filled where the author's forward only calls what fills them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import se_inject

from ..support.toys import Net, conv

CASES = {  # the body of a forward behind a branch `y`, with a slot `se` that is None, and `attn` that is an identity
    "called": ("y = self.attn(y); return x + y", "attn"),
    "asked for": ("y = self.se(y) if self.se is not None else y; return x + y", "se"),
    "with a gain": ("y = self.se(y) * 2.0 if self.se is not None else y; return x + y", "se"),
    "with a gain of one": ("y = 1.0 * self.se(y) if self.se is not None else y; return x + y", "se"),
    "with another gain": ("y = self.se(y) * 3.0 if self.se is not None else y; return x + y", None),
    "with another function": ("return x + (torch.tanh(self.se(y)) if self.se is not None else torch.relu(y))", None),
    "without a function": ("return x + (self.se(y) if self.se is not None else torch.relu(y))", None),
    "with another function at a size": (
        "if self.se is None: return x + (y * 2 if x.shape[2] > 8 else y)\n    return x + self.se(y)", None),
    "by class": ("y = self.attn(y); return x + (y if isinstance(self.attn, nn.Identity) else torch.relu(y))", None),
    "by name": ("y = self.attn(y); return x + (y if 'Identity' in str(self.attn) else torch.relu(y))", None),
    "by property": ("y = self.attn(y); return x + (torch.relu(y) if self.is_filled else y)", None),
    "by class at a size": (
        "y = self.attn(y)\n    if x.shape[2] > 8 and 'Identity' not in str(self.attn): y = y * 2\n    return x + y", None),
    "read elsewhere": ("z = self.attn(y); z += x; return torch.cat([y, z], 1)", None),
    "a part read elsewhere": (
        "z = y[:, :4]\n    if self.se is not None: y = self.se(y)\n    y += x; return torch.cat([y, z], 1)", None),
    "parts read elsewhere": ("z = y.chunk(2, 1); y = self.attn(y); y += x; return torch.cat([y, z[0]], 1)", None),
}


def unit(body):
    names = dict(globals())
    exec(f"def forward(self, x):\n    y = self.f(x)\n    {body}", names)

    class Unit(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Sequential(conv(16, 16), nn.Conv2d(16, 16, 3, padding=1))
            self.se, self.attn = None, nn.Identity()

        is_filled = property(lambda self: not isinstance(self.attn, nn.Identity))
        forward = names["forward"]

    return Unit()


@torch.no_grad()
@pytest.mark.parametrize("kind", CASES)
def test_a_slot_is_filled_where_nothing_else_depends_on_it(kind):
    body, slot = CASES[kind]
    model = Net(unit(body)).eval()
    images = [torch.randn(2, 3, n, n) for n in (8, 12)]
    expected = [model(x) for x in images]
    assert (slot in [s.slot for s in se_inject.plan(model, input_size=(3, 8, 8)).sites]) == (slot is not None)
    try:
        se_inject.inject(model, input_size=(3, 8, 8))
    except se_inject.NoSitesError:
        assert slot is None
    assert all(torch.equal(model(x), y) for x, y in zip(images, expected, strict=True))
