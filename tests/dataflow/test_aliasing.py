"""Memory that is written in place: gated where the outputs stay, refused where they would not."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import se_inject
from se_inject.surgery.state import block_paths

from ..support.checks import check_identity, randomise
from ..support.residual import Network, NormEnd


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
    model = Network(unit())
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
        check_identity(Network(InPlaceOfASum()), (3, 16, 16), placement=placement)
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


class Caller(Network):
    """Reads what it gave to its unit, instead of the result or beside it."""

    def __init__(self, unit, both):
        super().__init__(unit)
        self.both = both

    def forward(self, x):
        x = self.stem(x)
        y = self.units(x)
        return self.head((torch.cat([x, y]) if self.both else x).mean((2, 3)))


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
    check_identity(Network(ChangesNames()), (3, 16, 16))
    check_identity(Network(ChangesNames(), ChangesNames()), (3, 16, 16), placement="post")


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
    model = Network(PreActivation())
    if placement in ("pre", "identity"):
        with pytest.raises(se_inject.NoSitesError, match="changed in place"):
            se_inject.inject(model, input_size=(3, 16, 16), placement=placement)
    else:
        check_identity(model, (3, 16, 16), placement=placement)
