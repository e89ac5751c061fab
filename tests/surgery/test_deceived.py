"""Forwards that deceive a trace: the injected model computes what the base computes, or the place is skipped with its reason.

A new case is one line: the name of its kind, and the body of a residual block's forward.
"""

import abc
import collections
import contextlib
import copy
import functools
import logging
import random
import time
import typing
import warnings
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import se_inject
from se_inject.blocks import catalogue
from se_inject.errors import SEInjectError

FLAGS, LOG, SCOPES, COUNTS, TABLE = {"x": True}, [], [], collections.Counter(), {10: 0.5, 8: 0.25}
CASES = {
    # questions about the tensor that a proxy answers otherwise
    "isinstance": "y = self.f(x); return x + (y if isinstance(x, torch.Tensor) else y * 0.5)",
    "is_tensor": "y = self.f(x); return x + (y if torch.is_tensor(y) else y * 0.5)",
    "type": "y = self.f(x); return x + (y if type(y) is torch.Tensor else y * 0.5)",
    "type in a comprehension": "y = self.f(x); return x + (y if [type(t) for t in (x, y)][0] is torch.Tensor else y * 0.5)",
    "is in a generator": "y = self.f(x); return x + (y * 0.5 if any(n is self.count for n in x.shape[2:]) else y)",
    "function of a method's name": "return x + self.kind(self.f(x))",
    "hasattr": "y = self.f(x); return x + (y * 0.5 if hasattr(x, 'mask') else y)",
    "dtype is": "y = self.f(x); return x + (y if x.dtype is torch.float32 else y * 0.5)",
    "dtype table": "y = self.f(x); return x + y * {torch.float32: 0.5}.get(x.dtype, 1.0)",
    "size table": "y = self.f(x); return x + y * TABLE.get(x.shape[2], 1.0)",
    "size in": "y = self.f(x); return x + (y * 0.5 if x.shape[2] in {8, 10} else y)",
    "text table": "h, w = x.shape[2:]; return x + self.f(x) * {'10x10': 0.5}.get(f'{h}x{w}', 1.0)",
    "text": "return x + self.f(x) * {'10': 0.5}.get(str(x.shape[2]), 1.0)",
    "caught int": """
        try:
            k = int(x.shape[2]) / 8
        except Exception:
            k = 0.5
        return x + self.f(x) * k * 3""",
    "caught float": """
        try:
            k = float(x.shape[2])
        except Exception:
            k = 0.5
        return x + self.f(x) * k""",
    "requires_grad": "y = self.f(x); return x + (y * 0.5 if not x.requires_grad else y)",
    "is contiguous": "y = self.f(x); return x + (y * 0.5 if x.is_contiguous() else y)",
    "isinstance training": "y = self.f(x); return x + (y * 0.5 if self.training and isinstance(x, torch.Tensor) else y)",
    "isinstance size": "y = self.f(x); return x + (y * 0.5 if isinstance(x, torch.Tensor) and x.shape[2] == 8 else y)",
    "isinstance int": "h = x.shape[2]; return x + (self.f(x) * 0.5 if isinstance(h, int) and h == 8 else self.f(x))",
    "is": "y = self.f(x); return x + (y * 0.5 if x.shape[2] is self.count else y)",
    "rank": "y = self.f(x); return x + y * y.new_ones([1] * len(y.shape))",
    "rank asked": "y = self.f(x); return x + (y * 0.5 if len(x.shape) == 4 else y)",
    "batch": "y = self.f(x); return x + (y * 0.5 if len(x) == 2 else y)",
    "length of a list": "parts = [x, self.f(x)]; return parts[0] + parts[1] * (len(parts) - 1)",
    "length table": "y = self.f(x); return x + y * TABLE.get(len(x), 1.0)",
    "length text": "return x + self.f(x) * {'2': 0.5}.get(str(len(x)), 1.0)",
    "length loop": "y = self.f(x); return x + sum(y * 0.5 for _ in range(len(x)))",
    "minus one": "y = self.f(x); return x + y.softmax(-1 if str(x.shape[2]) == '10' else -2)",
    # the same operators, with other values passed to a layer
    "argument": "return x + self.times(self.f(x), 0.5 if hasattr(x, 'mask') else 1.0)",
    "argument by name": "return x + self.times(self.f(x), by=torch.is_grad_enabled())",
    "argument in a list": "return x + self.first([self.f(x), 0.5 if torch.is_grad_enabled() else 1.0])",
    "argument by size": "return x + self.times(self.f(x), {'10': 0.5}.get(str(x.shape[2]), 1.0))",
    # modes
    "grad": "y = self.f(x); return x + (y * 0.5 if torch.is_grad_enabled() else y)",
    "autocast": "y = self.f(x); return x + (y * 0.5 if torch.is_autocast_enabled('cpu') else y)",
    "inference": "y = self.f(x); return x + (y * 0.5 if torch.is_inference_mode_enabled() else y)",
    "training": "y = self.f(x); return x + (y * 0.5 if self.training else y)",
    "sets grad": "y = self.f(x)\n        with torch.no_grad():\n            z = y * 0.5\n        return x + y + z",
    # contexts
    "context": "y = self.f(x)\n        with flags('x'):\n            z = twice(y)\n        return x + z",
    "context of torch": """
        y = self.f(x)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            y = y.exp()
        return x + y""",
    "context in a method": "return x + self.scoped(self.f(x))",
    "context in a decorator": "return x + self.decorated(self.f(x))",
    "context on a stack": """
        stack = contextlib.ExitStack()
        stack.enter_context(flags('x'))
        y = self.f(x)
        stack.close()
        return x + y""",
    "context in a layer's method": "return x + self.times.scoped(self.f(x))",
    # questions that are no calls
    "match": """
        y = self.f(x)
        match y.shape:
            case (_, _, 8, 8):
                y = y * 0.5
            case _:
                pass
        return x + y""",
    "id": "y = self.f(x); return x + (y * 0.5 if id(x) == id(y) else y)",
    "caught view": """
        y = self.f(x)
        try:
            z = y.view(-1)
        except RuntimeError:
            z = y.reshape(-1)
        return x + z.view(y.shape)""",
    "begin of a text": "y = self.f(x); return x + (y * 0.5 if f'{x.shape[2]}'.startswith('1') else y)",
    "device text": "y = self.f(x); return x + (y * 0.5 if 'cpu' in str(x.device) else y)",
    "dtype text": "y = self.f(x); return x + (y if str(y.dtype) == 'torch.float32' else y * 0.5)",
    "name of a layer": "return x + getattr(self, f'f_{x.shape[2]}', self.f)(x)",
    "message": "torch._assert(x.shape[1] == 8, f'{x.shape[1]} channels'); return x + self.f(x)",
    "nan": "return x + self.f(x).masked_fill(x > 9, float('nan'))",
    "number of numpy": "return x + self.f(x) * self.gain",
    # side effects
    "global list": "LOG.append(1); return x + self.f(x)",
    "global counter": "COUNTS['x'] += 1; return x + self.f(x)",
    "helper": "note(); return x + self.f(x)",
    "isinstance counter": "y = self.f(x)\n        if isinstance(y, torch.Tensor): self.count += 1\n        return x + y",
    "own list": "self.seen.append(x.shape[0]); return x + self.f(x)",
    "own counter": "self.count += 1; return x + self.f(x)",
    "meter": "self.meter.total += 1; return x + self.f(x)",
    "print": "print('forward'); return x + self.f(x)",
    "log": "logging.getLogger('net').warning('forward'); return x + self.f(x)",
    "hook": """
        if not self.ready:
            self.f.register_forward_hook(lambda m, a, y: y * 0.5)
            self.ready = True
        return x + self.f(x)""",
    "child attribute": "self.f.scale = 2.0; return x + self.f(x)",
    "child mode": "\n        if self.training: self.f[1].eval()\n        return x + self.f(x)",
    "child counter": "\n        if self.training: self.f[1].num_batches_tracked.add_(1)\n        return x + self.f(x)",
    "child list": "y = self.f(x); self.times.seen.append(y.shape[0]); return x + y",
    "plain tensor": "self.steps.add_(1); return x + self.f(x)",
    "frozen layer": "self.f[0].requires_grad_(False); return x + self.f(x)",
    "frozen weight": "self.f[0].weight.requires_grad = False; return x + self.f(x)",
    "data": "y = self.f(x); y.data = y.data * 0.5; return x + y",
    "tag": "y = x + self.f(x); y.stride_of = 4; return y",
    "warning": "warnings.warn('slow'); return x + self.f(x)",
    # the same operators on other tensors
    "grad source": "y = x * 0.5; return x + self.f(y if torch.is_grad_enabled() else x)",
    "grad operand": "y = x * 0.5; return self.f(x) + (x if torch.is_grad_enabled() else y)",
    "grad result": "y = x + self.f(x); return y if torch.is_grad_enabled() else x * 0.5",
    "weights": "return x + self.f(x) * (self.f[1].weight if torch.is_grad_enabled() else self.f[1].bias).view(1, -1, 1, 1)",
    # conditions that must not be asked twice
    "changed size": "y = x.mul_(2.0); return x + (self.f(x) if y.shape[2] == 10 else self.f(x) * 0.5)",
    "drawn size": "y = torch.rand_like(x); return x + (self.f(x) if y.shape[2] == 10 else self.f(x) * 0.5) * y",
    # memory that another branch, or train mode, writes
    "changed at a size": """
        y = self.f(x)
        m = y.mean((2, 3), keepdim=True)
        if x.shape[2] < 10:
            y.mul_(2)
        return x + y + m""",
    "a view changed at a size": """
        y = self.f(x).view(x.shape)
        m = y.mean((2, 3), keepdim=True)
        if x.shape[2] < 10:
            self.act(y.flatten(2))
        return x + y + m""",
    "another value at a size": """
        y = self.f(x)
        m = y.mean((2, 3), keepdim=True)
        if x.shape[2] < 10:
            y = y * 2
        return x + y + m""",
    "dropped in place": "y = self.f(x); return x + self.drop(y) + y.mean((2, 3), keepdim=True)",
    # chance and time
    "seed": "torch.manual_seed(3); return x + self.f(x)",
    "random": "return x + self.f(x) * random.random()",
    "numpy": "return x + self.f(x) * np.random.rand()",
    "own generator": "return x + self.f(x) * self.generator.random()",
    "iterator": "return x + self.f(x) * next(self.numbers)",
    "clock": "return x + self.f(x) * time.perf_counter()",
    "torch": "return x + self.f(x) * torch.rand_like(x)",
    # calls
    "itself": "return x + self.f(x) if depth else self(x, depth=1)",
    "cached": "return x + self.f(x) * half_of(x.shape[2])",
    "flag": "return x + (self.f(x) if FLAGS['x'] else self.f(x) * 0.5)",
    "plain": "return x + self.f(x)",
    "sizes": "y = self.f(x); return x + (y * 0.5 if x.shape[2] == 10 else y)",
}
TAKEN = {  # cases that get their block
    "message", "nan", "number of numpy",
    "isinstance", "isinstance size", "plain", "sizes", "flag", "requires_grad", "is contiguous", "torch", "rank", "rank asked",
    "batch", "length of a list", "function of a method's name", "another value at a size", "dropped in place"}


@functools.lru_cache
def half_of(n):
    return 0.5 if n == 8 else 1.0


@contextlib.contextmanager
def flags(name):
    SCOPES.append(name)
    yield
    SCOPES.pop()


def twice(y):
    return y * 2


def note():
    LOG.append(1)


def kind(value):
    return type(value)


class Times(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, y, by):
        return (y * by).relu()

    def scoped(self, y):
        with flags("x"):
            return y * 0.5


class First(nn.Module):
    def forward(self, given):
        return (given[0] * given[1]).relu()


class Meter:
    def __init__(self):
        self.total = 0


def block(body):
    """A residual block with this forward."""
    names = {**globals(), "logging": logging, "time": time, "warnings": warnings}
    exec(f"def forward(self, x, depth=0):\n        {body.strip()}", names)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
            self.seen, self.count, self.ready, self.meter = [], 0, False, Meter()
            self.generator, self.numbers = random.Random(0), None
            self.times, self.first = Times(), First()
            self.gain, self.steps = np.linspace(0.0, 1.0, 3)[1], torch.zeros(1)
            self.act, self.drop = nn.ReLU(inplace=True), nn.Dropout(inplace=True)

        forward = names["forward"]

        def kind(self, x):
            return x * 0.5

        @flags("x")
        def decorated(self, x):
            return x * 0.5

        def scoped(self, x):
            with torch.profiler.record_function("scope"):
                return x * 0.5

    return Block()


def net(body):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 1), block("return x + self.f(x)"), block(body)).eval()


def outputs(model, x):
    """In eval mode without and with gradients, and in train mode, at one size, at another, and in a larger batch."""
    found = []
    for images in (x, x[..., :8, :8], x.repeat(2, 1, 1, 1)):
        for training, grad in ((False, False), (False, True), (True, True)):
            m = copy.deepcopy(model).train(training)
            m[2].numbers = iter([0.5, 0.25, 0.125])
            for draw in (random.seed, np.random.seed, torch.manual_seed):
                draw(0)
            with torch.set_grad_enabled(grad):
                found.append(m(images).detach())
    with torch.inference_mode():
        model[2].numbers = iter([0.5, 0.25, 0.125])
        found.append(copy.deepcopy(model)(x).clone())
    model[2].numbers = None
    return found


def effects(model, x):
    """What one forward does beside its output."""
    LOG.clear()
    COUNTS.clear()
    m = copy.deepcopy(model)
    m[2].numbers = iter([0.5] * 3)
    m(x)
    return (len(LOG), dict(COUNTS), m[2].seen, m[2].count, m[2].meter.total, m[2].ready, len(m[2].f._forward_hooks),
            m[2].times.seen, m[2].steps.item(), [p.requires_grad for k, p in m.named_parameters() if ".se." not in k])


@pytest.mark.filterwarnings("ignore:slow")
@pytest.mark.parametrize("kind", CASES)
def test_the_injected_model_computes_and_does_what_the_base_does(kind, capsys):
    model, x = net(CASES[kind]), torch.randn(2, 3, 10, 10)
    base = copy.deepcopy(model)
    model[2].numbers = iter(range(99))
    plan = se_inject.plan(model, input_size=(3, 10, 10))
    model[2].numbers = None
    assert [s.path for s in plan.sites][:1] == ["1.se"]
    assert ("2.se" in [s.path for s in plan.sites]) == (kind in TAKEN), plan
    assert all(s.reason for s in plan.skipped) and len(plan.all_sites) == 2
    model[2].numbers = iter(range(99))
    se_inject.inject(model, input_size=(3, 10, 10))
    model[2].numbers = None
    assert kind == "clock" or all(map(torch.equal, outputs(base, x), outputs(model, x)))
    assert effects(base, x) == effects(model, x)
    if kind not in ("sets grad", "inference"):
        capsys.readouterr()
        base(x) if kind != "iterator" else None
        expected = capsys.readouterr().out
        model(x) if kind != "iterator" else None
        assert capsys.readouterr().out == expected


class Says(nn.Module):
    """Also returns a plain value that a trace does not see."""

    def __init__(self):
        super().__init__()
        self.f = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))

    def forward(self, x):
        return x + self.f(x), torch.is_grad_enabled()


def test_a_plain_value_that_is_returned_is_the_author_s():
    plan = se_inject.plan(nn.Sequential(nn.Conv2d(3, 8, 1), Says()), input_size=(3, 10, 10))
    assert not plan.sites and "the output with other values" in plan.skipped[0].reason


def test_planning_leaves_no_hook_and_no_count():
    for kind in ("hook", "global list", "global counter", "own list", "meter"):
        model, x = net(CASES[kind]), torch.randn(2, 3, 10, 10)
        before = effects(model, x)
        LOG.clear()
        COUNTS.clear()
        se_inject.plan(model, input_size=(3, 10, 10))
        assert not LOG and not COUNTS and not model[2].seen and not model[2].meter.total and not model[2].f._forward_hooks
        assert effects(model, x) == before


def test_a_forward_of_the_instance_is_not_the_class_s():
    model = net(CASES["plain"])
    own = model[2].forward
    model[2].forward = lambda x: own(x) * 2
    plan = se_inject.plan(model, input_size=(3, 10, 10))
    assert [s.path for s in plan.sites] == ["1.se"] and "forward of its own instance" in plan.skipped[0].reason


class Variadic(nn.Module):
    """Arguments that are passed on."""

    def __init__(self):
        super().__init__()
        self.n, self.a = nn.BatchNorm2d(8), Child()

    def forward(self, x, *args, scale=1.0, **kw):
        return x + self.a(self.n(x), *args, **kw) * scale


class Child(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x, mask=None):
        y = self.out(torch.relu(self.conv(x)))
        return y if mask is None else y * mask


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


class Decorated(Variadic):
    forward = decorated(decorated(Variadic.forward))


class Returning(nn.Module):
    """Returns a dict, and cannot be traced."""

    def __init__(self, unit):
        super().__init__()
        self.stem, self.unit = nn.Conv2d(3, 8, 1), unit

    def forward(self, x):
        x = self.unit(self.stem(x))
        self.last = x.shape
        return {"map": x, "sum": x + 1}


@pytest.mark.parametrize("unit", [Variadic, Decorated])
def test_variadic_arguments_are_traced_as_empty_and_checked(unit):
    model, x = nn.Sequential(nn.Conv2d(3, 8, 1), unit()).eval(), torch.randn(2, 3, 10, 10)
    base, h = copy.deepcopy(model), torch.randn(2, 8, 10, 10)
    se_inject.inject(model, input_size=(3, 10, 10))
    assert se_inject.block_paths(model) == ["1.se"] and torch.equal(model(x), base(x))
    assert torch.equal(model[1](h, scale=0.5), base[1](h, scale=0.5))
    assert torch.equal(model[1](h, mask=h), base[1](h, mask=h))
    with pytest.raises(SEInjectError, match="was rewritten for one value of args"):
        model[1](h, h)


def test_nothing_is_hidden_under_a_parent_that_is_not_listed():
    class Odd(Child):
        def forward(self, x):
            self.last = x.shape
            return x + self.out(torch.relu(self.conv(x)))

    plan = se_inject.plan(Returning(Odd()), input_size=(3, 10, 10))
    assert plan.skipped and all(s.reason for s in plan.skipped)


class Locked(nn.Module):
    """An author's own __setattr__, which refuses, or writes to the dict."""

    refuses = True

    def __init__(self):
        super().__init__()
        self.f = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        self.__dict__["locked"] = True

    def __setattr__(self, name, value):
        if "locked" not in self.__dict__:
            super().__setattr__(name, value)
        elif self.refuses:
            raise AttributeError(f"{name} is locked")
        else:
            self.__dict__[name] = value

    def forward(self, x):
        return x + self.f(x)


class Writing(Locked):
    refuses = False


@pytest.mark.parametrize("unit", [Locked, Writing])
def test_an_authors_own_setattr(unit):
    model, x = nn.Sequential(nn.Conv2d(3, 8, 1), unit()), torch.randn(2, 3, 10, 10)
    expected, keys = model(x), list(model.state_dict())
    se_inject.inject(model, input_size=(3, 10, 10))
    nn.init.ones_(model[1].se.fc2.bias)
    assert not torch.equal(model(x), expected) and not any(p.is_meta for p in model.parameters())
    se_inject.eject(model)
    assert torch.equal(model(x), expected) and list(model.state_dict()) == keys and type(model[1]) is unit


class ByType(nn.Module):
    """Asks for the class of its blocks, which an injection changes."""

    def __init__(self):
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 8, 1), block(CASES["plain"])
        self.kind = type(self.block)

    def forward(self, x):
        x = self.stem(x)
        return self.block(x) if type(self.block) is self.kind else x


def test_verify_is_the_last_net():
    model, x = ByType().eval(), torch.randn(2, 3, 10, 10)
    expected, names = model(x), list(model.state_dict())
    with pytest.raises(SEInjectError, match="the injection was undone"):
        se_inject.inject(model, input_size=(3, 10, 10), verify=True)
    assert torch.equal(model(x), expected) and list(model.state_dict()) == names and not se_inject.block_paths(model)
    sound = net(CASES["plain"])
    for init in ("identity", "timm"):
        assert se_inject.block_paths(se_inject.inject(copy.deepcopy(sound), input_size=(3, 10, 10), init=init, verify=True))


def test_blocks_have_the_dtype_of_what_they_gate():
    model, x = net(CASES["plain"]).bfloat16(), torch.randn(2, 3, 10, 10, dtype=torch.bfloat16)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.float()
    expected = model(x)
    se_inject.inject(model, input_size=(3, 10, 10))
    assert torch.equal(model(x), expected) and F.relu(model(x)).dtype is torch.bfloat16


class Residual(nn.Module):
    def __init__(self, name="f"):
        super().__init__()
        self.add_module(name, nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)))
        self.name = name

    def forward(self, x):
        return x + self._modules[self.name](x)


class NoSubclass(Residual):
    def __init_subclass__(cls):
        raise TypeError("no subclass of this")


KNOWN: dict[str, type] = {}


class Registry(type):
    def __new__(cls, name, bases, members):
        if name in KNOWN:
            raise ValueError(f"{name} is known")
        KNOWN[name] = super().__new__(cls, name, bases, members)
        return KNOWN[name]


class Registered(Residual, metaclass=Registry):
    pass


class Abstract(Residual, abc.ABC):
    @abc.abstractmethod
    def kind(self): ...


class Concrete(Abstract):
    def kind(self):
        return "concrete"


@pytest.mark.parametrize("unit", [NoSubclass, Registered, Concrete])
def test_an_authors_rules_for_subclasses_are_not_asked(unit):
    model, x = nn.Sequential(nn.Conv2d(3, 8, 1), unit()), torch.randn(2, 3, 10, 10)
    expected = model(x)
    se_inject.inject(model, input_size=(3, 10, 10))
    assert torch.equal(model(x), expected) and isinstance(model[1], unit)
    nn.init.ones_(model[1].se.fc2.bias)
    assert not torch.equal(model(x), expected) and torch.equal(copy.deepcopy(model)(x), model(x))
    se_inject.eject(model)
    assert torch.equal(model(x), expected) and type(model[1]) is unit
    assert list(KNOWN.values()) == [Registered]


@pytest.mark.parametrize(("name", "works"), [
    ("a-b", True), ("0", True), ("a b", True), ("é", True), ("print", True), ("x", True),
    ("class", False), ("None", False), ('a"b', False), ("a\\nb", False), ("a\nb", False),
])  # fmt: skip
def test_odd_names_of_children(name, works):
    model, x = nn.Sequential(nn.Conv2d(3, 8, 1), Residual(name)), torch.randn(2, 3, 10, 10)
    expected = model(x)
    if works:
        se_inject.inject(model, input_size=(3, 10, 10))
        nn.init.ones_(model[1].se.fc2.bias)
        assert not torch.equal(model(x), expected)
    else:
        with pytest.raises(SEInjectError, match="has a name that cannot be written as code"):
            se_inject.inject(model, input_size=(3, 10, 10))
        assert torch.equal(model(x), expected) and type(model[1]) is Residual


def test_a_forward_that_is_no_function_is_skipped():
    class Property(Residual):
        @property
        def forward(self):
            return lambda x: x + self.f(x)

    model, x = nn.Sequential(nn.Conv2d(3, 8, 1), Property(), Residual()), torch.randn(2, 3, 10, 10)
    expected = model(x)
    assert se_inject.block_paths(se_inject.inject(model, input_size=(3, 10, 10))) == ["2.se"]
    assert torch.equal(model(x), expected)
    (skipped,) = se_inject.plan(nn.Sequential(nn.Conv2d(3, 8, 1), Property()), input_size=(3, 10, 10)).skipped
    assert skipped.owner == "1" and "has no signature" in skipped.reason


class Optional(Residual):
    def forward(self, x, mask=None, flag=False):
        y = self.f(x)
        if isinstance(mask, torch.Tensor):
            y = y * mask
        return x + (y * 3 if flag else y)


def test_an_argument_that_the_forward_asks_about_is_checked_at_each_call():
    base, x = nn.Sequential(nn.Conv2d(3, 8, 1), Optional()), torch.randn(2, 8, 10, 10)
    model = se_inject.inject(copy.deepcopy(base), input_size=(3, 10, 10))
    assert se_inject.block_paths(model) == ["1.se"] and torch.equal(model[1](x), base[1](x))
    for given in ({"mask": torch.zeros(8, 1, 1)}, {"flag": True}):
        with pytest.raises(SEInjectError, match="was rewritten for one value of"):
            model[1](x, **given)


class Ordered(Residual):
    def forward(self, x):
        return collections.OrderedDict(out=x + self.f(x))


def test_a_forward_keeps_the_class_of_what_it_returns():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.plain, self.unit = nn.Conv2d(3, 8, 1), Residual(), Ordered()

        def forward(self, x):
            return self.unit(self.plain(self.stem(x)))

    model = se_inject.inject(Net(), input_size=(3, 10, 10))
    assert se_inject.block_paths(model) == ["plain.se", "unit.se"]
    assert type(model(torch.randn(2, 3, 10, 10))) is collections.OrderedDict
    assert type(se_inject.optimize_for_inference(model)(torch.randn(2, 3, 10, 10))) is collections.OrderedDict


def test_an_author_who_answers_every_name():
    class Any(Residual):
        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                if "name" in self.__dict__ and not name.startswith("_"):
                    return None
                raise

    model = nn.Sequential(nn.Conv2d(3, 8, 1), Any())
    assert se_inject.block_paths(se_inject.inject(model, input_size=(3, 10, 10))) == ["1.se"]


def test_default_values_stay_as_they_were():
    seen = []

    class Default(Residual):
        def forward(self, x, seen=seen):
            seen.append(1)
            return x + self.f(x)

    model = nn.Sequential(nn.Conv2d(3, 8, 1), Residual(), Default())
    assert se_inject.block_paths(se_inject.inject(model, input_size=(3, 10, 10))) == ["1.se"] and not seen


def test_verify_of_one_small_image_and_of_no_values():
    model = timm.create_model("resnet18")
    se_inject.inject(model, example_inputs=torch.randn(1, 3, 32, 32), verify=True)
    assert se_inject.block_paths(model)
    with torch.device("meta"):
        empty = timm.create_model("resnet18")
    with pytest.raises(SEInjectError, match="the model has no values"):
        se_inject.inject(empty, verify=True)
    assert not se_inject.block_paths(empty)


@functools.lru_cache
def window(n):
    return torch.hann_window(n)


TABLES: dict = {}
HALF = np.float64(0.5)


def table(n):
    if n not in TABLES:
        TABLES[n] = torch.linspace(0.0, 1.0, n)
    return TABLES[n]


class Caching(nn.Module):
    """Keeps tensors that it makes of sizes: where a function does, in a table of its class, and in one of another function."""

    made: ClassVar[dict] = {}

    def __init__(self):
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 8, 1), block(CASES["plain"])
        self.numbers = torch.Generator().manual_seed(0)

    def forward(self, x):
        n = x.shape[-1]
        if n not in self.made:
            self.made[n] = torch.ones(n)
        y = self.block(self.stem(x)) * window(n) * self.made[n] + table(n)
        return y * (1 + random.random() + np.random.rand()) + torch.rand(1, generator=self.numbers)


def test_planning_leaves_nothing_in_caches_and_random_numbers_as_they_were():
    model, x = Caching().eval(), torch.randn(2, 3, 10, 10)
    expected = []
    for plan in (False, True):
        random.seed(0), np.random.seed(0), model.numbers.manual_seed(0)
        Caching.made.clear(), TABLES.clear(), window.cache_clear()
        if plan:
            assert len(se_inject.plan(model, input_size=(3, 10, 10)).sites) == 1
        expected.append(model(x))
    assert torch.equal(*expected)


class Hooked(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.f, self.attn = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Identity()
        self.attn.register_forward_hook(lambda m, args, y: y * 0.5)

    def forward(self, x):
        x = self.stem(x)
        return x + self.attn(self.f(x).relu())


def test_a_slot_with_a_hook_is_not_filled():
    model, x = Hooked().eval(), torch.randn(2, 3, 10, 10)
    expected = model(x)
    se_inject.inject(model, input_size=(3, 10, 10))
    assert type(model.attn) is nn.Identity and torch.equal(model(x), expected)


def with_option(function):
    @functools.wraps(function)
    def wrapper(self, *args, as_dict=False):
        out = function(self, *args)
        return {"out": out} if as_dict else out

    return wrapper


class Written(nn.Module):
    """Its annotations and defaults are written otherwise than fx writes them; it returns one number for each image, or one."""

    def __init__(self, whole):
        super().__init__()
        self.stem, self.f, self.whole = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), whole

    def forward(self, x, act: Callable[[torch.Tensor], torch.Tensor] | None = None, k=HALF) -> [torch.Tensor]:
        x = self.stem(x)
        y = x + self.f(x).relu() * k
        return y.mean() if self.whole else y.mean((1, 2, 3))


class Literal(Hooked):
    def forward(self, x, mode: typing.Literal["a", "b"] = "a", k: typing.Annotated[float, "gain"] = 0.5):
        x = self.stem(x)
        return x + self.f(x).relu() * k


class WithOption(Hooked):
    forward = with_option(Hooked.forward)


def test_annotations_defaults_and_plain_results():
    x = torch.randn(2, 3, 10, 10)
    for whole in (True, False):
        model = Written(whole).eval()
        expected = model(x)
        se_inject.inject(model, input_size=(3, 10, 10))
        assert torch.equal(model(x), expected) and len(se_inject.block_paths(model)) == 1
    assert len(se_inject.plan(Literal(), input_size=(3, 10, 10)).sites) == 1
    plan = se_inject.plan(WithOption(), input_size=(3, 10, 10))
    assert not plan.sites and "a decorator of its forward has an argument of its own, as_dict" in plan.skipped[0].reason


class Asked(nn.Module):
    """Compares an argument with None that has no default."""

    def __init__(self):
        super().__init__()
        self.f = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x, gain):
        if gain is None:
            gain = 0.5
        return x + self.f(x).relu() * gain


def test_an_argument_that_is_compared_with_none_is_checked_at_each_call():
    model, x, gain = Asked().eval(), torch.randn(2, 8, 10, 10), torch.rand(8, 1, 1)
    expected = model(x, gain)
    se_inject.inject(model, example_inputs=(x, gain))
    assert torch.equal(model(x, gain), expected)
    with pytest.raises(SEInjectError, match="rewritten for one value of gain"):
        model(x, None)


@functools.lru_cache
def planned(name):
    return se_inject.plan(Caching(), input_size=(3, 10, 10))


def test_caches_of_who_plans_stay():
    first = planned("a")
    planned("b")
    assert planned("a") is first
    assert "requires_grad_" not in vars(torch.Tensor)


def renaming(function):
    @functools.wraps(function)
    def wrapper(self, image):
        return function(self, image)

    return wrapper


class Renamed(Hooked):
    forward = renaming(Hooked.forward)


def test_a_decorator_may_rename_an_argument():
    assert len(se_inject.plan(Renamed(), input_size=(3, 10, 10)).sites) == 1


def test_blocks_that_take_other_maps_than_the_small_one(monkeypatch):
    class Wide(nn.Module):
        def __init__(self, channels):
            super().__init__()
            assert channels >= 32
            self.fc, self.gate = nn.Conv2d(channels, channels, 1), nn.Sigmoid()

        def forward(self, x):
            assert x.shape[-1] != 8
            return x * self.gate(self.fc(x.mean((2, 3), keepdim=True)))

    monkeypatch.setitem(catalogue._rows, "wide", catalogue.Block("wide", Wide))
    plan = se_inject.plan("resnetv2_50", block="wide", init="timm", placement="pre", input_size=(3, 96, 96))
    assert len(plan.sites) == 16
