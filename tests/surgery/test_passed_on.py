"""`**kwargs` that a forward only passes on to its children stay open; any other use of them is checked at each call."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn

import se_inject
from se_inject import SEInjectError


class Attention(nn.Module):
    """Returns (output, weights), as those of transformers; what it returns depends on its keyword arguments."""

    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x, scale=1.0, form="pair", **kwargs):
        y = self.out(torch.relu(self.conv(x))) * scale + kwargs.get("add", 0.0)
        return {"pair": (y, None), "weights": (y, y), "triple": (y, None, None)}[form]


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.child = Attention()


class Layer(Residual):
    def forward(self, x, **kwargs):
        y, _ = self.child(x, **kwargs)
        return x + y


def checkpointing(forward):
    """A decorator that reads keyword arguments on a branch that is not taken, as transformers' layers have."""

    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        if self.gradient_checkpointing and kwargs.get("use_cache"):
            kwargs["use_cache"] = False
        return forward(self, *args, **kwargs)

    return wrapper


class Decorated(Residual):
    gradient_checkpointing = False
    forward = checkpointing(Layer.forward)


class Several(Residual):
    """Two calls, other arguments beside, and a method in between."""

    def attend(self, x, **kwargs):
        return self.child(x, **kwargs)

    def forward(self, x, **kwargs):
        y = self.attend(x, **kwargs)
        z = self.child(x + 1, unused=3, **kwargs)
        return x + y[0] + z[0]


class Ignoring(Residual):
    def forward(self, x, **kwargs):
        return x + self.child(x)[0]


class Training(Residual):
    """Draws in train mode, so that there is a graph for each mode."""

    def forward(self, x, **kwargs):
        y, _ = self.child(x, **kwargs)
        return x + nn.functional.dropout(y, 0.5, self.training)


def pair(cls):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 8, 1), cls()).eval()
    model = se_inject.inject(copy.deepcopy(base), input_size=(3, 10, 10))
    assert se_inject.block_paths(model)
    return base[1], model[1], torch.randn(2, 8, 10, 10)


@pytest.mark.parametrize("cls", [Layer, Decorated, Several, Ignoring, Training])
def test_passed_on_arguments_reach_the_children(cls):
    base, owner, x = pair(cls)
    given = {"scale": 0.5, "add": torch.randn(8, 1, 1), "more": "any"}
    plain = base(x)
    assert torch.equal(owner(x), plain) and torch.equal(owner(x, **given), base(x, **given))
    assert torch.equal(base(x, **given), plain) == (cls is Ignoring)
    base.train(), owner.train()
    torch.manual_seed(1)
    expected = base(x, **given)
    torch.manual_seed(1)
    assert torch.equal(owner(x, **given), expected)


def test_passed_on_arguments_survive_copies():
    base, owner, x = pair(Layer)
    nn.init.ones_(owner.se.fc2.weight)
    expected = owner(x, scale=0.5)
    assert not torch.equal(expected, base(x, scale=0.5))
    for again in (copy.deepcopy(owner), pickle.loads(pickle.dumps(owner))):
        assert torch.equal(again(x, scale=0.5), expected)
    owner.note = "set"  # it is generated again before the next call
    assert torch.equal(owner(x, scale=0.5), expected)


@pytest.mark.parametrize("form, returned", [("weights", "Tensor, Tensor"), ("triple", "Tensor, NoneType, NoneType")])
def test_a_child_that_returns_another_form_is_refused(form, returned):
    """The trace holds ``y, _ =`` and ``if weights is not None``: for another form the author's code may do something else."""
    _, owner, x = pair(Layer)
    with pytest.raises(SEInjectError, match=rf"the layer 'child' returned tuple\({returned}\) where it got form, and tuple\("):
        owner(x, form=form)


class Calling(Attention):
    """Has a `__call__` of its own, which reads the keyword arguments."""

    def __call__(self, x, **kwargs):
        return super().__call__(x, scale=kwargs["scale"]) if "scale" in kwargs else super().__call__(x)


class CallsWhole(Layer):
    def __init__(self):
        super().__init__()
        self.child = Calling()


def test_a_child_with_a_call_of_its_own_is_called_whole():
    base, owner, x = pair(CallsWhole)
    assert torch.equal(owner(x), base(x)) and torch.equal(owner(x, scale=0.5), base(x, scale=0.5))


def test_a_child_whose_call_does_something_is_refused():
    class Adds(Attention):
        def __call__(self, x):
            return super().__call__(x + 1)

    class Owner(Residual):
        def __init__(self):
            super().__init__()
            self.child = Adds()

        def forward(self, x):
            return x + self.child(x)[0]

    model = nn.Sequential(nn.Conv2d(3, 8, 1), Owner())
    call = Adds.__call__
    with pytest.raises(se_inject.NoSitesError, match="does something else when traced"):
        se_inject.inject(model, input_size=(3, 10, 10))
    assert Adds.__call__ is call


def test_a_forward_is_traced_in_eval_mode_where_it_reads_its_arguments():
    class Flag(Residual):
        def forward(self, x, flag=False, **kwargs):
            y = self.child(x)[0]
            if not self.training and flag:
                y = y * 2
            return x + (y * 3 if kwargs.get("more") else y)

    base, owner, x = pair(Flag)
    assert torch.equal(owner(x), base(x))
    with pytest.raises(SEInjectError, match="was rewritten for one value of flag"):
        owner(x, flag=True)


def test_arguments_of_the_recorded_call_are_checked():
    """A call without them may get another form from a child, and no argument says so."""
    torch.manual_seed(0)

    class Gives(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.layer = nn.Conv2d(3, 8, 1), Layer()

        def forward(self, x):
            return self.layer(self.stem(x), form="weights")

    model = se_inject.inject(Gives().eval(), input_size=(3, 10, 10))
    x = torch.randn(2, 8, 10, 10)
    assert se_inject.block_paths(model) == ["layer.se"]
    model.layer(x, form="weights")
    with pytest.raises(SEInjectError, match="was rewritten for one value of kwargs"):
        model.layer(x)


def test_a_child_that_returns_an_object_gets_no_further_arguments():
    class Output:
        def __init__(self, y, weights):
            self.y, self.weights = y, weights

    class Objects(Attention):
        def forward(self, x, weights=True, **kwargs):
            y, _ = super().forward(x)
            return Output(y, y if weights else None)

    class Owner(Residual):
        def __init__(self):
            super().__init__()
            self.other = Objects()

        def forward(self, x, **kwargs):
            out, y = self.other(x, **kwargs), self.child(x)[0]
            return x + (y if out.weights is not None else y * 2)

    base, owner, x = pair(Owner)
    assert torch.equal(owner(x), base(x))
    with pytest.raises(SEInjectError, match="was rewritten for one value of kwargs"):
        owner(x, weights=False)


def test_parameters_that_fx_renames():
    class Input(Residual):
        def forward(self, input, **kwargs):
            y, _ = self.child(input, **kwargs)
            return input + nn.functional.dropout(y, 0.5, self.training)

    base, owner, x = pair(Input)
    base.train(), owner.train()
    torch.manual_seed(1)
    expected = base(x, scale=0.5)
    torch.manual_seed(1)
    assert torch.equal(owner(x, scale=0.5), expected)


def test_positional_only_parameters_are_refused():
    class Only(Residual):
        def forward(self, x, scale=1.0, /, **kwargs):
            return x + self.child(x, **kwargs)[0] * scale

    model = nn.Sequential(nn.Conv2d(3, 8, 1), Only())
    (skipped,) = se_inject.plan(model, input_size=(3, 10, 10)).skipped
    assert "positional-only" in skipped.reason


def read(x, **kwargs):
    return x * kwargs.get("scale", 1.0)


class Helper:
    def __call__(self, x, **kwargs):
        return read(x, **kwargs)


def reading_decorator(forward):
    @functools.wraps(forward)
    def wrapper(self, x, **kwargs):
        y = forward(self, x, **kwargs)
        return y * 2 if "scale" in kwargs else y

    return wrapper


class Asks(Residual):
    def forward(self, x, **kwargs):
        y = self.child(x, **kwargs)[0]
        return x + (2 * y if "scale" in kwargs else y)


class Takes(Residual):
    def forward(self, x, **kwargs):
        scale = kwargs.pop("scale", 1.0)
        return x + self.child(x, **kwargs)[0] * scale


class GivesAFunction(Residual):
    def forward(self, x, **kwargs):
        return x + read(self.child(x)[0], **kwargs)


class GivesAnObject(Residual):
    helper = Helper()

    def forward(self, x, **kwargs):
        return x + self.helper(self.child(x)[0], **kwargs)


class GivesAMethodWithNames(Residual):
    def inner(self, x, scale=1.0, **kwargs):
        return self.child(x, **kwargs)[0] * scale

    def forward(self, x, **kwargs):
        return x + self.inner(x, **kwargs)


class Closes(Residual):
    def forward(self, x, **kwargs):
        return x + (lambda y: self.child(y, **kwargs)[0] * kwargs.get("scale", 1.0))(x)


class Looks(Residual):
    def forward(self, x, **kwargs):
        y = self.child(x, **kwargs)[0]
        return x + (2 * y if "scale" in locals()["kwargs"] else y)


class Copies(Residual):
    def forward(self, x, **kwargs):
        given = dict(kwargs)
        y = self.child(x, **kwargs)[0]
        return x + (2 * y if given else y)


class DecoratedReading(Residual):
    forward = reading_decorator(Layer.forward)


class CalledWithTwoForms(Residual):
    """The same child returns two forms in the recorded run: neither can be checked by its path."""

    def forward(self, x, **kwargs):
        y = self.child(x, **kwargs)[0]
        z = self.child(x, form="weights", add=kwargs.get("add", 0.0))[1]
        return x + y + z


@pytest.mark.parametrize("cls", [
    Asks, Takes, GivesAFunction, GivesAnObject, GivesAMethodWithNames, Closes, Looks, Copies, DecoratedReading,
    CalledWithTwoForms])  # fmt: skip
def test_arguments_that_are_read_are_checked_at_each_call(cls):
    base, owner, x = pair(cls)
    assert torch.equal(owner(x), base(x))
    with pytest.raises(SEInjectError, match="was rewritten for one value of kwargs"):
        owner(x, scale=0.5)
