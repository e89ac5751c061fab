"""TODO"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

ADDS = {operator.add, operator.iadd, torch.add, "add", "add_"}
MULS = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
CATS = {torch.cat, torch.concat, torch.concatenate}
LAYOUTS = {
    "view", "reshape", "expand", "expand_as", "unsqueeze", "squeeze", "flatten", "contiguous", "view_as", "to",
    "type_as", "unflatten", "permute", "transpose", "swapaxes", "movedim", torch.reshape, torch.flatten,
    torch.unsqueeze, torch.squeeze, torch.permute, torch.transpose, torch.movedim,
}  # fmt: skip
SLICES = {operator.getitem, "narrow", torch.narrow}
LINEAR = ADDS | MULS | CATS | LAYOUTS | SLICES | {
    operator.sub, operator.isub, torch.sub, "sub", "sub_", operator.neg, operator.truediv,
    operator.itruediv, operator.floordiv, operator.ifloordiv, "div",
    "size", "mean", "sum", "chunk", "split", "roll", "clone", "dim", torch.mean,
    torch.sum, torch.chunk, torch.split, torch.roll, torch.stack,
    F.pad, F.avg_pool2d, F.adaptive_avg_pool2d, F.interpolate, F.conv1d, F.conv2d, F.linear, F.batch_norm,
    F.layer_norm, F.group_norm, F.dropout, F.pixel_shuffle, F.pixel_unshuffle, getattr,
}


def is_tensor(node: object) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


SAME = {F.dropout, F.dropout2d, "contiguous", "clone", "to", "type_as", torch.clone}  # also dropout: in train mode, too
POSITIVE = {F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_", F.leaky_relu, F.leaky_relu_, F.prelu, torch.prelu,
             torch.abs, "abs"}
POOLS = {
    F.avg_pool2d, F.adaptive_avg_pool2d, F.max_pool2d, F.adaptive_max_pool2d, F.lp_pool2d, F.interpolate,
    torch.max_pool2d, torch.nn.functional.upsample}
MEANS = {"mean", torch.mean, "sum", torch.sum, "amax", torch.amax}
CONVS = {F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d}
BATCH_NORMS = {F.batch_norm, torch.batch_norm}
SIZES = {getattr, "size", "dim"}
DIVISIONS = {operator.truediv, operator.itruediv, torch.div, torch.true_divide, "div"}


def conv_arguments(node: fx.Node) -> tuple[fx.Node | None, fx.Node | None, fx.Node | None, int]:
    names = ("input", "weight", "bias")
    x, w, b = (argument(node, i, n) for i, n in enumerate(names))
    groups = 1 if node.target is F.linear else argument(node, 6, "groups", 1)
    return x, w, b, groups


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a function, given by position or by name."""
    return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)


AVERAGES = {t for t in MEANS if "mean" in str(t)}
ADAPTIVE_POOLS = {F.adaptive_avg_pool2d, F.adaptive_avg_pool1d, torch.adaptive_avg_pool1d}
ELEMENTWISE = {
    F.relu, F.relu_, F.relu6, F.silu, F.gelu, F.hardswish, F.hardsigmoid, F.hardtanh, F.leaky_relu, F.elu, F.mish, F.softplus,
    F.sigmoid, F.tanh, torch.relu, torch.sigmoid, torch.tanh, "relu", "sigmoid", "sigmoid_", "tanh", "tanh_", "clamp"} | (
        MULS | ADDS | DIVISIONS)
POOLINGS = {
    "mean", torch.mean, "amax", torch.amax, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.avg_pool2d,
    operator.matmul, torch.matmul}  # a product with attention weights is a weighted mean


def unexpanded(node: fx.Node) -> fx.Node:
    """What a value is before it was expanded."""
    while node.op == "call_method" and node.target in ("expand", "expand_as") and is_tensor(node.args[0]):
        node = node.args[0]  # type: ignore[assignment]
    return node
