"""Memory that is written in place: gated where the outputs stay, refused where they would not."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import timm
import torch
from torch import nn

import se_inject
from se_inject.surgery.session import traced
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


class Out(NormEnd):
    def forward(self, x):
        y = self.b(self.a(x))
        torch.add(y, x, out=y)
        return y


class OutOfACat(NormEnd):
    def forward(self, x):
        y = self.b(self.a(x))
        z = torch.empty_like(y)
        torch.cat([y[:, :4], x[:, 4:]], 1, out=z)
        return x + z


class Foreach(NormEnd):
    def forward(self, x):
        y = self.b(self.a(x))
        torch._foreach_add_([y], [x])
        return y


class Parts(InPlaceModule):
    """Part of what the activation writes into is read later, from the list that the split returned."""

    def forward(self, x):
        y = self.b(self.a(x))
        parts = y.chunk(2, 1)
        y = self.act(y)
        y += x
        return y + parts[0].mean()


class IntoX(NormEnd):
    def forward(self, x):
        x += self.b(self.a(x))
        return x


class AfterIntoX(NormEnd):
    """Reads what it gave to a unit, which writes into it, after it has written into what the unit returned."""

    def __init__(self):
        super().__init__()
        self.unit = IntoX()

    def forward(self, x):
        h = x * 2
        y = self.unit(h)
        y.relu_()
        return h + y


class Twice(AfterIntoX):
    """The second call of a unit is the one whose result is written into."""

    def forward(self, x):
        x = self.unit(x * 2)
        return super().forward(x)


class Tail(NormEnd):
    """The activation writes into what its caller reads again after a write."""

    def __init__(self):
        super().__init__()
        self.tail = nn.Sequential(nn.ReLU(inplace=True), timm.layers.DropPath(0.1))

    def forward(self, x):
        y = self.b(self.a(x))
        z = self.tail(y)
        z += x
        return z + y.mean((2, 3), keepdim=True)


@dataclasses.dataclass
class State:
    """No container that torch knows."""

    h: torch.Tensor


class Bump(nn.Module):
    def forward(self, state):
        state.h.add_(1)


class InAnObject(NormEnd):
    """A child writes into a tensor that it gets in an object."""

    def __init__(self):
        super().__init__()
        self.bump = Bump()

    def forward(self, x):
        y = self.b(self.a(x))
        self.bump(State(y))
        return x + y


def test_an_object_that_holds_a_value_reads_it():
    unit = InAnObject()
    with traced(Network(unit), (3, 16, 16)) as traces:
        view = traces.view(unit)
        (held,) = (n for n in view.nodes if n.target is State)
        assert view.carries_data(held) and held in view.readers(next(n for n in view.nodes if n.target == "b"))


@torch.no_grad()
@pytest.mark.parametrize("placement", ["auto", "post"])
@pytest.mark.parametrize("unit", [Out, OutOfACat, Foreach, Parts, Twice, Tail, InAnObject])
def test_memory_that_is_written_by_name_in_a_list_or_outside(unit, placement):
    model, x = randomise(Network(unit())).eval(), torch.randn(2, 3, 16, 16)
    expected = model(x)
    try:
        assert torch.equal(se_inject.inject(model, input_size=(3, 16, 16), placement=placement)(x), expected)
    except se_inject.NoSitesError as error:
        assert "changed in place" in str(error) or "changes a tensor in place" in str(error)


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
