"""One row for each operator that a forward may call: how it is spelled, and what it does to values and to memory.

A node of a trace names its operator in one of several spellings: ``x + y`` is ``operator.add``, ``torch.add``, the method
``add``, in place ``operator.iadd`` or ``add_``, and in an exported graph ``aten.add.Tensor``. All spellings of an operator
lead to the same row, so that they get the same answer everywhere. An operator without a row has no trait: nothing is
assumed of it.

To make an operator known, add a row by its name in aten (``special_entr``), whose schema tells its memory. The tests run
each row on random tensors and check each trait, in both directions.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from ..capture.author_code import draws_by_name
from ..capture.tracer import IN_PLACE
from ..private import OpOverloadPacket, schemas_of

NEW, VIEW = "new", "view"


@dataclasses.dataclass(frozen=True)
class Op:
    """What is known of one operator. *The input* is its first argument.

    Attributes:
        name: Its name in aten where it has one, else in torch.
        args: Names of the arguments, by position.
        linear: The result is affine in the tensor arguments. Of `factors` at most one may vary; `fixed` may not vary.
        factors: Arguments that are multiplied with each other.
        fixed: Arguments in which the operator is not affine.
        normalizes: It divides the input by the input's own deviation (in train mode, for a batch norm). That is not
            linear, and no nonlinear work either.
        scales: A positive factor on one element of the input is the same factor on that element of the result.
        elementwise: An element of the result depends on the same element of the inputs alone.
        reduces: It takes the ``mean``, ``sum`` or ``max`` over the axes `dim`.
        pools: It combines neighboring positions, each channel apart: by ``mean``, ``max`` or ``power``, or to ``resize``.
            A positive factor on a channel of the input is the same factor on that channel of the result.
        views: The result has the elements of the input in another shape or order; some may be repeated.
        slices: The result has some of the elements of the input.
        casts: The result is the input, perhaps of another dtype or in other memory.
        asks: The result is a plain value, such as a size.
        drops: It drops elements in train mode; in eval mode it returns the input.
        memory: ``new``: the result is in memory that the operator takes, or in place in that of an input. ``view``: it may be
            in the memory of an input. None: not known; the operator may keep its result, or give out what it keeps.
        unless: Arguments that must not be set for the row to hold.
    """

    name: str
    args: tuple[str, ...] = ("input",)
    linear: bool = False
    factors: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    normalizes: bool = False
    scales: bool = False
    elementwise: bool = False
    reduces: str = ""
    pools: str = ""
    views: bool = False
    slices: bool = False
    casts: bool = False
    asks: bool = False
    drops: bool = False
    memory: str | None = None
    unless: tuple[str, ...] = ()


UNKNOWN = Op("")
ROWS: dict[str, Op] = {}
SPELLINGS: dict[Any, str] = {}  # a function, or the name of a method: to the name of the row
_ORDERS: dict[Any, tuple[str, ...]] = {}  # functions whose arguments come in another order than the row says
_WRITES: set[Any] = {  # spellings that write into their first argument; where tensors have no method, Python does without
    spelling for f in IN_PLACE if hasattr(torch.Tensor, f"__{f.__name__}__") for spelling in (f, f"__{f.__name__}__")}
_OPERATORS = {"add", "sub", "mul", "matmul", "neg", "abs", "pow"}  # those of Python that mean what torch means by the name


def _row(
    name: str, args: str = "input", *, also: Iterable[Any] = (), orders: Mapping[Any, str] | None = None,
    memory: str | None = "", **traits: Any,
) -> None:  # fmt: skip
    """Add a row under its name's spellings in torch, and under those of `also`: further names, or functions.

    Where `memory` is not given, torch's schemas say it.
    """
    factors, fixed, unless = (tuple(traits.pop(key, "").split()) for key in ("factors", "fixed", "unless"))
    ROWS[name] = Op(
        name, tuple(args.split()), factors=factors, fixed=fixed, unless=unless,
        memory=_memory_by_schema(name) if memory == "" else memory, **traits)
    for spelling in (name, *also):
        _spell(name, spelling)
    for function, order in (orders or {}).items():
        _spell(name, function)
        _ORDERS[function] = tuple(order.split())


def _spell(name: str, spelling: Any) -> None:
    if not isinstance(spelling, str):
        SPELLINGS.setdefault(spelling, name)
        return
    for word, writes in ((spelling, False), (f"{spelling}_", True)):
        homes: list[Any] = [F, torch]
        found = [getattr(home, word) for home in homes if callable(getattr(home, word, None))]
        if hasattr(torch.Tensor, word):
            found.append(word)
        for target in found:
            SPELLINGS.setdefault(target, name)
            if writes:
                _WRITES.add(target)
    if spelling in _OPERATORS:
        SPELLINGS[getattr(operator, spelling)] = SPELLINGS[f"__{spelling}__"] = name
        if hasattr(operator, f"i{spelling}"):
            SPELLINGS[getattr(operator, f"i{spelling}")] = SPELLINGS[f"__i{spelling}__"] = name


def _memory_by_schema(name: str) -> str | None:
    """What the schemas of ``aten::<name>`` say of the memory of the result."""
    schemas = schemas_of(f"aten::{name}")
    results = [r.alias_info for schema in schemas for r in schema.returns]
    if not results:
        return None
    return VIEW if any(alias is not None and not alias.is_write for alias in results) else NEW


# sums and products
_row("add", "input other alpha", linear=True, elementwise=True)
_row("sub", "input other alpha", also=("subtract",), linear=True, elementwise=True)
_row("mul", "input other", also=("multiply",), linear=True, factors="input other", scales=True, elementwise=True)
_row("div", "input other rounding_mode", also=("divide", "true_divide", operator.truediv, operator.itruediv, "__truediv__"),
     linear=True, fixed="other", scales=True, elementwise=True, unless="rounding_mode")
_row("neg", also=("negative",), linear=True, scales=True, elementwise=True)
_row("addcmul", "input tensor1 tensor2 value", linear=True, factors="tensor1 tensor2", elementwise=True)
_row("matmul", "input other", linear=True, factors="input other")
_row("bmm", "input mat2", linear=True, factors="input mat2")
_row("mm", "input mat2", linear=True, factors="input mat2")
_row("addmm", "input mat1 mat2", linear=True, factors="mat1 mat2")
_row("linear", "input weight bias", linear=True, factors="input weight")
for _n in (1, 2, 3):
    _row(f"conv{_n}d", "input weight bias stride padding dilation groups", linear=True, factors="input weight")
    _row(f"conv_transpose{_n}d", "input weight bias stride padding output_padding groups dilation", linear=True,
         factors="input weight")
MATMULS = {"matmul", "bmm", "mm"}
CONVS = {"conv1d", "conv2d", "conv3d"}
TRANSPOSED_CONVS = {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}

# norms
_row("batch_norm", "input running_mean running_var weight bias training momentum eps", linear=True, normalizes=True,
     factors="input weight", fixed="running_mean running_var",
     orders={torch.batch_norm: "input weight bias running_mean running_var training momentum eps cudnn_enabled"})
_row("layer_norm", "input normalized_shape weight bias eps", normalizes=True)
_row("group_norm", "input num_groups weight bias eps", normalizes=True)
_row("rms_norm", "input normalized_shape weight eps", normalizes=True)
_row("instance_norm", "input running_mean running_var weight bias use_input_stats momentum eps", normalizes=True,
     orders={torch.instance_norm: "input weight bias running_mean running_var use_input_stats momentum eps cudnn_enabled"})
_row("normalize", "input p dim eps", memory=NEW)

# activations and other functions of one element
for _name in ("relu", "leaky_relu", "abs"):
    _row(_name, scales=True, elementwise=True)
_row("prelu", "input weight", scales=True, elementwise=True, fixed="weight")
for _name in (
        "relu6", "silu", "gelu", "elu", "selu", "celu", "mish", "softplus", "softsign", "hardswish", "hardsigmoid", "hardtanh",
        "sigmoid", "tanh", "logsigmoid", "hardshrink", "softshrink", "tanhshrink", "exp", "log", "sqrt", "rsqrt", "square",
        "reciprocal", "erf", "sin", "cos"):
    _row(_name, elementwise=True, also=(torch.special.expit,) if _name == "sigmoid" else (),
         memory=NEW if _name in ("softsign", "logsigmoid", "tanhshrink", "relu6", "mish", "hardtanh") else "")
_row("clamp", "input min max", also=("clip",), elementwise=True)
_row("pow", "input exponent", elementwise=True)
_row("where", "condition input other", linear=True, fixed="condition")
_ORDERS["where"] = ("input", "condition", "other")  # the method
for _name in ("softmax", "norm", "scaled_dot_product_attention"):
    _row(_name)

# reductions and pools
_row("mean", "input dim keepdim", linear=True, reduces="mean")
_row("sum", "input dim keepdim", linear=True, reduces="sum")
_row("amax", "input dim keepdim", reduces="max")
for _n in (1, 2, 3):
    _row(f"avg_pool{_n}d", "input kernel_size stride padding", linear=True, pools="mean")
    _row(f"adaptive_avg_pool{_n}d", "input output_size", linear=True, pools="mean")
    _row(f"max_pool{_n}d", "input kernel_size stride padding", pools="max")
    _row(f"adaptive_max_pool{_n}d", "input output_size", pools="max")
    _row(f"lp_pool{_n}d", "input norm_type kernel_size stride", pools="power", memory=NEW)
_row("interpolate", "input size scale_factor mode", also=("upsample", "upsample_nearest"), linear=True,
     pools="resize", memory=NEW)

# elements moved, kept or left out
for _name in (
        "view", "reshape", "view_as", "reshape_as", "expand", "expand_as", "broadcast_to", "unsqueeze", "squeeze", "flatten",
        "unflatten", "ravel", "permute", "transpose", "t", "swapaxes", "swapdims", "movedim", "moveaxis"):
    _row(_name, linear=True, views=True)
for _name in ("repeat", "tile", "roll", "flip", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle"):
    _row(_name, linear=True)
_row("pad", "input pad mode value", linear=True)
_row("cat", "tensors dim", also=("concat", "concatenate"), linear=True)
_row("stack", "tensors dim", linear=True)
_row("getitem", "input index", also=(operator.getitem, "__getitem__"), linear=True, slices=True, memory=VIEW)
_row("narrow", "input dim start length", linear=True, slices=True)
_row("select", "input dim index", linear=True, slices=True)
for _name in ("chunk", "split", "tensor_split", "unbind"):
    _row(_name, linear=True, memory=VIEW)
for _name in ("to", "type", "type_as", "float", "double", "half", "bfloat16", "contiguous"):
    _row(_name, linear=True, scales=True, casts=True, memory=VIEW)
_row("clone", linear=True, scales=True, casts=True)
for _name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout"):
    _row(_name, "input p training", linear=True, scales=_name != "alpha_dropout", drops=True, memory=NEW)
for _name in ("size", "dim", "numel", "ndimension", "stride", "is_floating_point", "is_contiguous"):
    _row(_name, asks=True, memory=None)
_row("len", also=(len,), asks=True, memory=None)  # a function of Python, and no method
_row("getattr", also=(getattr,), linear=True, asks=True, memory=None)  # x.shape, but also x.T


def of(node: object) -> Op:
    """The row of the operator that a node calls; `UNKNOWN` for other nodes and operators."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return UNKNOWN
    row = ROWS.get(SPELLINGS.get(node.target) or _aten_name(node.target), UNKNOWN)
    if row.unless and any(argument(node, name) is not None for name in row.unless):
        return UNKNOWN
    if (row.casts or row.views) and is_tensor(node) and is_tensor(first := argument(node, "input")):
        old, new = first.meta["val"].dtype, node.meta["val"].dtype
        if (old != new and row.views) or (old.is_floating_point and not new.is_floating_point):
            return UNKNOWN  # it reads bits as another number, or rounds
    return row


def name_of(node: object) -> str:
    """The name of the operator that a node calls; empty where it has no row."""
    return of(node).name


@functools.lru_cache(maxsize=4096)
def _aten_name(target: Any) -> str:
    packet = getattr(target, "overloadpacket", target)
    if not isinstance(packet, OpOverloadPacket) or not str(packet).startswith("aten."):
        return ""
    name = str(packet).removeprefix("aten.")
    return name.removesuffix("_") if name not in ROWS else name


@functools.lru_cache(maxsize=4096)
def _order(target: Any) -> tuple[str, ...]:
    """The names of a spelling's arguments, by position."""
    if target in _ORDERS:
        return _ORDERS[target]
    row = ROWS.get(SPELLINGS.get(target) or _aten_name(target), UNKNOWN)
    schema = getattr(target, "_schema", None)
    if schema is None or not _aten_name(target):
        return row.args
    names = {"self": "input", "train": "training"}
    return tuple(names.get(a.name, a.name) for a in schema.arguments)


_OTHER_NAMES = {"input": ("self",), "dim": ("axis",), "keepdim": ("keepdims",), "training": ("train",)}


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """An argument of an operator, by the name that its row has for it; it may be given by position or by name."""
    order = _order(node.target)
    if name in order and order.index(name) < len(node.args):
        return node.args[order.index(name)]
    return next((node.kwargs[key] for key in (name, *_OTHER_NAMES.get(name, ())) if key in node.kwargs), default)


def layer_arguments(node: fx.Node) -> tuple[Any, Any, Any, int]:
    """Input, weight, bias and groups of a convolution or a linear layer."""
    return argument(node, "input"), argument(node, "weight"), argument(node, "bias"), argument(node, "groups", 1)


def writes(node: fx.Node) -> bool:
    """Whether the spelling of a node's operator writes into its first argument, or into ``out``."""
    if node.op not in ("call_function", "call_method"):
        return False
    if node.kwargs.get("out") is not None:
        return True
    if isinstance(node.target, str) and node.target.endswith("_") and not node.target.endswith("__"):
        return True
    exported = getattr(node.target, "overloadpacket", node.target)
    return node.target in _WRITES or node.kwargs.get("inplace") is True or (
        isinstance(exported, OpOverloadPacket) and str(exported).endswith("_"))


def draws(node: fx.Node) -> bool:
    """Whether a node's operator draws random numbers, in one of its overloads."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op in ("call_function", "call_method") and draws_by_name(name)


def products(node: object) -> Iterator[tuple[fx.Node, Any]]:
    """Both readings of a product: a tensor, and what it is multiplied by. Nothing for other operators."""
    if isinstance(node, fx.Node) and name_of(node) == "mul":
        a, b = argument(node, "input"), argument(node, "other")
        for x, k in ((a, b), (b, a)):
            if is_tensor(x):
                yield x, k


def sums(node: object) -> Iterator[tuple[fx.Node, Any]]:
    """The readings of a sum: a tensor whose factor is 1, and what is added to it or taken from it. Nothing for others."""
    if isinstance(node, fx.Node) and name_of(node) in ("add", "sub"):
        a, b = argument(node, "input"), argument(node, "other")
        plain = name_of(node) == "add" and argument(node, "alpha", 1) == 1
        for x, k in ((a, b), (b, a)) if plain else ((a, b),):
            if is_tensor(x):
                yield x, k


def unexpanded(node: fx.Node) -> fx.Node:
    """What a value is before it was expanded."""
    while name_of(node) in ("expand", "expand_as", "broadcast_to") and is_tensor(node.args[0]):
        node = node.args[0]  # type: ignore[assignment]
    return node


def is_tensor(node: object) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)
