"""Each row of the table of operators is run on random tensors, and each of its traits is checked in both directions."""

import operator
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import se_inject
from se_inject.dataflow import ops
from se_inject.find import patterns

from ..support.toys import Net


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def positive(*shape):
    return torch.rand(*shape, dtype=torch.float64) + 0.5


MAP = (2, 4, 6, 6)
SAMPLES = {  # arguments by row; what is not here is a function of one map, or of two where the row has `other`
    "addcmul": lambda: (rand(*MAP), rand(*MAP), rand(*MAP)),
    "matmul": lambda: (rand(2, 3, 4), rand(2, 4, 5)), "bmm": lambda: (rand(2, 3, 4), rand(2, 4, 5)),
    "mm": lambda: (rand(3, 4), rand(4, 5)), "addmm": lambda: (rand(3, 5), rand(3, 4), rand(4, 5)),
    "linear": lambda: (rand(2, 3, 4), rand(5, 4), rand(5)),
    "conv1d": lambda: (rand(2, 4, 6), rand(5, 4, 3), rand(5)), "conv2d": lambda: (rand(*MAP), rand(5, 4, 3, 3), rand(5)),
    "conv3d": lambda: (rand(2, 4, 6, 6, 6), rand(5, 4, 3, 3, 3), rand(5)),
    "conv_transpose1d": lambda: (rand(2, 4, 6), rand(4, 5, 3), rand(5)),
    "conv_transpose2d": lambda: (rand(*MAP), rand(4, 5, 3, 3), rand(5)),
    "conv_transpose3d": lambda: (rand(2, 4, 6, 6, 6), rand(4, 5, 3, 3, 3), rand(5)),
    "batch_norm": lambda: (rand(*MAP), rand(4), positive(4), rand(4), rand(4), False, 0.1, 1e-5),
    "layer_norm": lambda: (rand(2, 3, 4), (4,), rand(4), rand(4)), "group_norm": lambda: (rand(*MAP), 2, rand(4), rand(4)),
    "rms_norm": lambda: (rand(2, 3, 4), (4,), rand(4)), "instance_norm": lambda: (rand(*MAP), None, None, rand(4), rand(4)),
    "prelu": lambda: (rand(*MAP), positive(4)), "clamp": lambda: (rand(*MAP), -0.5, 0.5), "pow": lambda: (positive(*MAP), 2.5),
    "softmax": lambda: (rand(*MAP), 1), "where": lambda: (rand(*MAP) > 0, rand(*MAP), rand(*MAP)),
    "scaled_dot_product_attention": lambda: (rand(2, 3, 4), rand(2, 3, 4), rand(2, 3, 4)),
    "view": lambda: (rand(*MAP), (2, 4, 36)), "reshape": lambda: (rand(*MAP), (2, 4, 36)),
    "view_as": lambda: (rand(*MAP), rand(2, 4, 36)), "reshape_as": lambda: (rand(*MAP), rand(2, 4, 36)),
    "expand": lambda: (rand(2, 4, 1, 1), MAP), "expand_as": lambda: (rand(2, 4, 1, 1), rand(*MAP)),
    "broadcast_to": lambda: (rand(2, 4, 1, 1), MAP), "unsqueeze": lambda: (rand(*MAP), 1),
    "unflatten": lambda: (rand(*MAP), 1, (2, 2)), "permute": lambda: (rand(*MAP), (0, 2, 3, 1)), "t": lambda: (rand(3, 4),),
    "repeat": lambda: (rand(*MAP), (1, 2, 1, 1)), "tile": lambda: (rand(*MAP), (1, 2, 1, 1)),
    "roll": lambda: (rand(*MAP), 1, 2), "flip": lambda: (rand(*MAP), (2,)), "pad": lambda: (rand(*MAP), (1, 1)),
    "pixel_shuffle": lambda: (rand(*MAP), 2), "pixel_unshuffle": lambda: (rand(*MAP), 2),
    "channel_shuffle": lambda: (rand(*MAP), 2), "getitem": lambda: (rand(*MAP), (slice(None), slice(1, 3))),
    "narrow": lambda: (rand(*MAP), 1, 1, 2), "select": lambda: (rand(*MAP), 1, 2), "chunk": lambda: (rand(*MAP), 2, 1),
    "split": lambda: (rand(*MAP), 2, 1), "tensor_split": lambda: (rand(*MAP), 2, 1), "unbind": lambda: (rand(*MAP), 1),
    "to": lambda: (rand(*MAP), torch.float64), "type": lambda: (rand(*MAP), torch.float64),
    "type_as": lambda: (rand(*MAP), rand(1)), "interpolate": lambda: (rand(*MAP), 3),
    "lp_pool1d": lambda: (positive(2, 4, 6), 2, 2), "lp_pool2d": lambda: (positive(*MAP), 2, 2),
    "lp_pool3d": lambda: (positive(2, 4, 6, 6, 6), 2, 2),
    **{name: lambda: (rand(*MAP), 1, 2) for name in ("transpose", "swapaxes", "swapdims", "movedim", "moveaxis")},
    **{name: lambda: ([rand(*MAP), rand(*MAP)], 1) for name in ("cat", "stack")},
    **{name: lambda: (rand(*MAP), (2, 3)) for name in ("mean", "sum", "amax")},
    **{name: lambda: (rand(*MAP), 0.5, False) for name, op in ops.ROWS.items() if op.drops},
    "dropout1d": lambda: (rand(2, 4, 6), 0.5, False), "dropout3d": lambda: (rand(2, 4, 6, 6, 6), 0.5, False),
    "squeeze": lambda: (rand(2, 4, 1, 6),), "relu6": lambda: (rand(*MAP) * 9,),
    **{name: lambda: (positive(*MAP),) for name in ("log", "sqrt", "rsqrt")},
    **{f"{pool}{n}d": lambda n=n: (rand(2, 4, *[6] * n), 2) for n in (1, 2, 3) for pool in (
        "avg_pool", "adaptive_avg_pool", "max_pool", "adaptive_max_pool")},
}
ROWS = [op for op in ops.ROWS.values() if not op.asks]
WHOLE = {"expand", "broadcast_to", "repeat", "permute", "tile", "view", "reshape"}  # methods that take sizes one by one, too


def args_of(op):
    torch.manual_seed(0)
    if op.name in SAMPLES:
        return SAMPLES[op.name]()
    return (rand(*MAP), rand(*MAP)) if "other" in op.args else (rand(*MAP),)


def spellings(op):
    return [s for s, name in ops.SPELLINGS.items() if name == op.name]


def call(spelling, args):
    if not isinstance(spelling, str):
        order = ops._ORDERS.get(spelling)
        if order:  # the sample is in the row's order
            by_name = dict(zip(ops.ROWS[ops.SPELLINGS[spelling]].args, args))
            more = {"cudnn_enabled": False, "momentum": 0.1, "eps": 1e-5, "use_input_stats": True}
            args = tuple(by_name.get(name, more.get(name)) for name in order)
        return spelling(*args)
    if spelling.startswith("__"):
        return getattr(operator, spelling.strip("_") if hasattr(operator, spelling.strip("_")) else spelling)(*args)
    return getattr(args[0], spelling)(*args[1:])


def first(op):
    """A function of the row's arguments."""
    found = [s for s in spellings(op) if s not in ops._ORDERS and s not in ops._WRITES]
    functions = [s for s in found if not isinstance(s, str)]
    return lambda *args: call((functions or found)[0], args)


def node_of(spelling, args):
    graph = fx.Graph()
    op = "call_method" if isinstance(spelling, str) else "call_function"
    return graph.create_node(op, spelling, tuple(graph.placeholder(f"a{i}") if isinstance(a, torch.Tensor) else a
                                                 for i, a in enumerate(args)), {})


@pytest.mark.filterwarnings("ignore:`nn.functional.upsample")
@pytest.mark.parametrize("op", ROWS, ids=lambda op: op.name)
def test_all_spellings_compute_the_same(op):
    reference = None
    for spelling in spellings(op):
        args = args_of(op)
        try:
            value = call(spelling, args)
        except (TypeError, RuntimeError, NotImplementedError) as error:  # no such overload: of another arity, or integers alone
            assert len(spellings(op)) > 1, error
            continue
        tensors = list(value) if isinstance(value, (tuple, list)) else [value]
        tensors = tensors[:1] if op.pools == "max" else tensors  # torch's own gives the places, too
        if op.drops or not all(isinstance(t, torch.Tensor) for t in tensors):
            continue
        reference = reference or tensors
        assert all(torch.allclose(a.double(), b.double(), rtol=1e-2) for a, b in zip(tensors, reference, strict=True)), spelling
        if spelling in ops._WRITES:
            assert tensors[0] is args[0] and ops.writes(node_of(spelling, args)), spelling
        else:
            assert not ops.writes(node_of(spelling, args)), spelling


def vary(op, args, names):
    """The sample's arguments with those of these names, and their tensors, moved by random tensors."""
    moved = list(args)
    for i, name in enumerate(op.args):
        if name in names and i < len(args):
            a = args[i]
            moved[i] = [t + rand(*t.shape) for t in a] if isinstance(a, list) else a + rand(*a.shape)
    return tuple(moved)


def blend(a, b, k):
    """The arguments on the line through two samples, at `k`."""
    def one(x, y):
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            return x + k * (y - x)
        return [one(p, q) for p, q in zip(x, y)] if isinstance(x, list) else x
    return tuple(map(one, a, b))


def is_affine(op, names):
    f, a = first(op), args_of(op)
    b = vary(op, a, names)
    at = [f(*blend(a, b, k)) for k in (0.0, 0.5, 1.0)]
    at = [torch.cat([t.flatten() for t in v]) if isinstance(v, (tuple, list)) else v for v in at]
    return torch.allclose((at[0].double() + at[2].double()) / 2, at[1].double(), atol=0.1 if op.casts else 1e-10)


def tensor_args(op):
    return [name for name, a in zip(op.args, args_of(op)) if isinstance(a, list) or (
        isinstance(a, torch.Tensor) and a.is_floating_point())]


@pytest.mark.parametrize("op", ROWS, ids=lambda op: op.name)
def test_linear(op):
    names = tensor_args(op)
    free = [name for name in names if name not in op.factors and name not in op.fixed]
    if not op.linear:
        assert not is_affine(op, names[:1])
        return
    for name in op.factors or names[:1]:
        assert is_affine(op, [name, *free] if name == "input" and "weight" not in op.factors else [name])
    assert is_affine(op, free)
    if len(op.factors) > 1:
        assert not is_affine(op, op.factors)
    for name in op.fixed:
        assert name not in names or not is_affine(op, [name]) or op.name == "batch_norm"


def scaled(op, factor):
    """The results for the first argument, and for it times a factor, if the operator takes a single map there."""
    args = args_of(op)
    if not isinstance(args[0], torch.Tensor) or not args[0].is_floating_point():
        return None
    by, rest = factor(args[0]), (0.5, True) if op.drops else args[1:]
    torch.manual_seed(1)
    y = first(op)(args[0], *rest)
    torch.manual_seed(1)
    z = first(op)(args[0] * by, *rest)
    return (y, z, by) if isinstance(y, torch.Tensor) and isinstance(z, torch.Tensor) else None


@pytest.mark.parametrize("op", ROWS, ids=lambda op: op.name)
def test_scales(op):
    torch.manual_seed(1)
    factors = {}
    found = scaled(op, lambda x: factors.setdefault("f", positive(*x.shape)))
    holds = found is not None and found[0].shape == found[2].shape and torch.allclose(
        found[1].double(), found[0].double() * found[2], rtol=0.05 if op.casts else 1e-8, atol=1e-12)
    assert holds == op.scales


@pytest.mark.parametrize("op", ROWS, ids=lambda op: op.name)
def test_elementwise(op):
    args = args_of(op)
    if op.drops or op.casts or op.views or op.normalizes or isinstance(args[0], list) or (
            op.args[0] not in tensor_args(op)):
        return  # of an element alone, too, but nobody asks
    y = first(op)(*args)
    other = args[0].clone()
    at = min(41, other.numel() - 1)
    other.view(-1)[at] += 0.25
    z = first(op)(other, *args[1:])
    if not isinstance(y, torch.Tensor) or y.shape != args[0].shape:
        assert not op.elementwise
        return
    changed = (y != z).flatten().nonzero().flatten().tolist()
    assert (changed in ([at], [])) == op.elementwise or op.name == "addmm"


@pytest.mark.parametrize("op", [op for op in ROWS if op.reduces], ids=lambda op: op.name)
def test_reduces(op):
    x, dims = args_of(op)
    expected = {"mean": x.sum(dims) / 36, "sum": x.flatten(2).cumsum(2)[..., -1], "max": x.flatten(2).sort()[0][..., -1]}
    assert torch.allclose(first(op)(x, dims), expected[op.reduces])


@pytest.mark.parametrize("op", [op for op in ROWS if op.pools], ids=lambda op: op.name)
def test_pools_keep_channels_apart(op):
    x, *rest = args_of(op)
    by = positive(4).view(-1, *[1] * (x.dim() - 2))
    assert torch.allclose(first(op)(x * by, *rest), first(op)(x, *rest) * by)
    same = torch.full_like(x, 0.5)
    if op.pools in ("mean", "max", "resize"):
        assert torch.allclose(first(op)(same, *rest), torch.tensor(0.5, dtype=x.dtype))
    high = first(op)(x.abs(), *rest)
    assert (op.pools == "max") == bool(torch.isin(high, x.abs()).all()) or op.pools == "resize"


@pytest.mark.parametrize("op", [op for op in ROWS if op.views or op.slices or op.casts], ids=lambda op: op.name)
def test_elements_are_moved_and_not_computed(op):
    args = args_of(op)
    y = first(op)(*args).contiguous()
    if op.casts:
        assert y.shape == args[0].shape and torch.allclose(y.double(), args[0], rtol=1e-2)
        return
    kept = torch.isin(args[0], y).double().mean()
    assert torch.isin(y, args[0]).all() and (kept == 1) == op.views


@pytest.mark.parametrize("op", [op for op in ROWS if op.normalizes], ids=lambda op: op.name)
def test_normalizes(op):
    args = list(args_of(op))
    if op.name == "batch_norm":
        args[5] = True
    x = args[0]
    y, z = (first(op)(x * k, *args[1:]) for k in (10, 1000))
    assert torch.allclose(y, z, atol=1e-4) and not torch.allclose(y, y * 2)


def storages(value):
    tensors = value if isinstance(value, (tuple, list)) else [value]
    return {t.untyped_storage().data_ptr() for t in tensors if isinstance(t, torch.Tensor)}


@pytest.mark.parametrize("op", ROWS, ids=lambda op: op.name)
def test_memory(op):
    args = args_of(op)
    value = first(op)(*args)
    shared = storages(value) & storages([a for arg in args for a in (arg if isinstance(arg, list) else [arg])])
    if op.memory == ops.NEW:
        assert not shared or op.drops  # which return the very input in eval mode
    elif op.memory == ops.VIEW:
        assert shared or op.name in ("float", "half", "bfloat16")  # another dtype here
    else:
        spelled = {getattr(s, "__name__", s) for s, name in ops.SPELLINGS.items() if name == op.name}
        in_aten = [name for name in spelled if torch._C._jit_get_schemas_for_operator(f"aten::{name}")]
        assert op.name == "normalize" or not in_aten, "the row should have the name of aten"


@pytest.mark.parametrize("op", [op for op in ops.ROWS.values() if op.asks and op.name != "getattr"], ids=lambda op: op.name)
def test_asks(op):
    assert not isinstance(first(op)(rand(*MAP)), torch.Tensor)


def test_rounding_is_another_operator_than_division():
    x = fx.Graph().placeholder("x")
    assert ops.of(x.graph.call_function(torch.div, (x, 2.0))).linear
    assert not ops.of(x.graph.call_function(torch.div, (x, 2.0), {"rounding_mode": "floor"})).linear


@pytest.mark.parametrize("spelling, argument, known", [
    ("to", torch.float16, True), ("to", torch.int32, False), ("type", torch.bool, False), ("type_as", torch.arange(2), False),
    (torch.Tensor.view, torch.int64, False), ("view", torch.int64, False), ("view", (2, -1), True)])
def test_a_cast_that_rounds_and_a_view_of_other_numbers_have_no_row(spelling, argument, known):
    x = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    node = node_of(spelling, (x, argument))
    node.args[0].meta["val"] = x
    node.meta["val"] = call(spelling, (x, argument))
    assert (ops.of(node) is not ops.UNKNOWN) == known


@pytest.mark.parametrize("name", ["floordiv", "mod", "and", "or", "xor", "lshift", "rshift", "truediv", "pow"])
def test_what_python_writes_into_a_tensor(name):
    x = torch.ones(4, dtype=torch.float64 if name == "truediv" else torch.int64)
    spellings = getattr(operator, f"i{name}"), f"__i{name}__"
    assert all(ops.writes(node_of(s, (x, x))) for s in spellings) and spellings[0](x, 1) is x


def test_out_is_written():
    x = fx.Graph().placeholder("x")
    assert ops.writes(x.graph.call_function(torch.add, (x, x), {"out": x}))
    assert not ops.writes(x.graph.call_function(torch.add, (x, x)))


def test_exported_operators_have_the_rows_of_torch():
    x = fx.Graph().placeholder("x")
    aten = torch.ops.aten
    found = [x.graph.call_function(f, (x,)) for f in (aten.relu.default, aten.relu_, aten.mean.dim)]
    assert [ops.name_of(n) for n in found] == ["relu", "relu", "mean"] and ops.writes(found[1])
    node = x.graph.call_function(aten.where.self, (1, 2, 3))
    assert (ops.argument(node, "condition"), ops.argument(node, "input"), ops.argument(node, "other")) == (1, 2, 3)
    node = x.graph.call_function(aten.batch_norm.default, (x, 1, 2, 3, 4, False, 0.1, 1e-5, True))
    assert (ops.argument(node, "weight"), ops.argument(node, "running_var"), ops.argument(node, "training")) == (1, 4, False)


def test_the_name_of_a_child_is_no_operator():
    graph = fx.Graph()
    x = graph.placeholder("view")
    assert ops.name_of(x) == ops.name_of(graph.call_module("mul", (x,))) == ""


# in a branch that is one convolution and this, all spellings of an operator get the same answer
class Unit(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16, 1, 1) * 0.1)
        self.register_buffer("mask", torch.ones(8, 8, dtype=torch.bool))
        self.pool, self.pool3d = nn.AvgPool2d(3, 1, 1), nn.AvgPool3d((1, 3, 3), 1, (0, 1, 1))
        self.instance, self.rms = nn.InstanceNorm2d(16), nn.RMSNorm(8)
        self.bn, self.up, self.down = nn.BatchNorm2d(16), nn.ConvTranspose2d(16, 16, 1), nn.Conv2d(16, 16, 1)


def unit(code):
    names = {"torch": torch, "F": F, "operator": operator}
    exec(f"def forward(self, x):\n    y = F.conv2d(x, self.weight)\n    return x + {code}", names)

    class Written(Unit):
        forward = names["forward"]

    return Written


NORM = "self.bn.running_mean, self.bn.running_var"
AFFINE = "self.bn.weight, self.bn.bias"
LINEAR = [
    ("y / 2.0", "torch.div(y, 2.0)", "y.div(2.0)", "torch.true_divide(y, 2.0)", "operator.truediv(y, 2.0)", "y.divide(2.0)"),
    ("y * 0.5", "torch.mul(y, 0.5)", "y.mul(0.5)", "torch.multiply(y, 0.5)", "y.mul_(0.5)", "0.5 * y"),
    ("self.bn(y)", f"F.batch_norm(y, {NORM}, {AFFINE})", f"torch.batch_norm(y, {AFFINE}, {NORM}, False, 0.1, 1e-5, False)"),
    ("F.dropout(y, 0.1, False)", "F.dropout2d(y, 0.1, False)", "torch.dropout(y, 0.1, False)"),
    ("self.up(y)", "F.conv_transpose2d(y, self.up.weight, self.up.bias)", "torch.conv_transpose2d(y, self.up.weight)"),
    ("self.down(y)", "F.conv2d(y, self.down.weight)", "torch.conv2d(y, self.down.weight, self.down.bias)"),
    ("(y - 1.0)", "torch.sub(y, 1.0)", "y.sub(1.0)", "torch.subtract(y, 1.0)"),
    ("(-y)", "torch.neg(y)", "y.neg()", "operator.neg(y)", "torch.negative(y)"),
    ("y.flip(2)", "torch.flip(y, (2,))"), ("y.roll(1, 2)", "torch.roll(y, 1, 2)"),
    ("self.pool(y)", "F.avg_pool2d(y, 3, 1, 1)", "self.pool3d(y)"),
    ("self.instance(y)", "F.instance_norm(y)"), ("self.rms(y)", "F.rms_norm(y, (8,))", "torch.rms_norm(y, (8,))"),
    ("torch.where(self.mask, y, 0.0)", "y.where(self.mask, 0.0)"),
]
NONLINEAR = [
    ("torch.relu(y)", "y.relu()", "F.relu(y)", "y.relu_()", "torch.relu_(y)", "F.relu(y, inplace=True)", "y.clamp(min=0)"),
    ("torch.sigmoid(y)", "y.sigmoid()", "F.sigmoid(y)", "torch.special.expit(y)"),
    ("(y * y)", "torch.mul(y, y)", "y.mul(y)", "y.square()", "y ** 2", "torch.pow(y, 2)"),
    ("2.0 / (y + 9.0)", "torch.div(2.0, y + 9.0)", "(y + 9.0).reciprocal()"),
]


@pytest.mark.parametrize("codes", [*LINEAR, *NONLINEAR], ids=lambda codes: codes[0])
def test_every_spelling_gets_the_same_answer(codes):
    answers = defaultdict(list)
    for code in codes:
        plan = se_inject.plan(Net(unit(code)()), input_size=(3, 8, 8))
        answers[tuple((s.kind, s.channels, s.reason) for s in plan.all_sites)].append(code)
    assert len(answers) == 1, dict(answers)
    (((kind, channels, reason),),) = answers
    assert (kind, channels) == ("residual", 16)
    assert (reason is None) == (codes in NONLINEAR) and reason in (None, patterns.LINEAR)
