"""Blocks in an owner: put into its graph, put into the module, and taken out again.

There are four kinds of edits; the lightest that serves is taken. An empty slot is filled, and the author's own forward
calls it. A plain `nn.Sequential` gets the block as one more child, without a position of its own. An `fx.GraphModule` gets
a new graph. Any other owner gets a subclass of its own class, with a forward that is generated from its traced graph.
Weights and their names stay where they are.
"""

from __future__ import annotations

import dataclasses
import itertools
import keyword
from typing import Any

import torch
from torch import fx, nn

from ..blocks.masks import WEIGHS, filled, restored, unpadded
from ..capture.calls import REST
from ..capture.forward import form_of
from ..capture.graphs import counterparts
from ..capture.passed_on import passing
from ..capture.snapshot import set_class
from ..dataflow import ops
from ..dataflow.ops import writes
from ..errors import Refusal, SEInjectError
from .state import Edit, OwnerEdits, base_class, edits_of, has_generated_class, mark_inside, set_edits


def put_in(graph: fx.Graph, edits: tuple[Edit, ...], masks: tuple[str, ...] = ()) -> fx.Graph:
    """`graph` with the blocks called; it is changed. `masks` are arguments that the blocks get, by `call_with_masks`.

    Raises:
        Refusal: A child's name is no name in code.
    """
    nodes = list(graph.nodes)
    for name in {part for n in nodes if n.op in ("call_module", "get_attr") for part in str(n.target).split(".")}:
        if keyword.iskeyword(name) or set(name) & {'"', "\\"} or not name.isprintable():
            raise Refusal(f"its child {name!r} has a name that cannot be written as code")
    for edit in edits:
        _insert(graph, nodes, edit, masks)
    graph.lint()
    return graph


def _insert(graph: fx.Graph, nodes: list[fx.Node], edit: Edit, masks: tuple[str, ...]) -> None:
    node = nodes[edit.node]
    after = node
    if node.op == "placeholder":
        after = [n for n in graph.nodes if n.op == "placeholder"][-1]
    given: dict[str, fx.node.Argument] = {str(n.target): n for n in nodes if n.op == "placeholder" and n.target in masks}
    with graph.inserting_after(after):
        if given:
            block = graph.get_attr(edit.slot)
            with graph.inserting_after(block):
                call = graph.call_function(call_with_masks, (block, node), given)
        else:
            call = graph.call_module(edit.slot, (node,))
    if edit.users is None:
        node.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)
    else:
        for i in edit.users:
            nodes[i].replace_input_with(node, call)


def check_forms(graph: fx.Graph, forms: dict[str, str]) -> None:
    """Let a graph check what a child returns to which it passes ``**kwargs`` on: the trace holds decisions on the form."""
    for node in passing(graph):
        with graph.inserting_after(node):
            graph.call_function(check_form, (node, node.kwargs[REST], str(node.target), forms[str(node.target)]))


def check_form(value: Any, given: dict[str, Any], child: str, form: str) -> None:
    """
    Raises:
        SEInjectError: The child, which got the keyword arguments `given`, has not returned a value of this form.
    """
    if given and not isinstance(value, fx.Proxy) and form_of(value) != form:
        raise SEInjectError(
            f"the layer {child!r} returned {form_of(value)} where it got {', '.join(given)}, and {form} when the model was "
            "injected: eject(), then inject() the model as it is called")


def call_with_masks(block: nn.Module, x: torch.Tensor, **masks: torch.Tensor | None) -> torch.Tensor:
    """Call a block on a value of which some tokens may be padding. These stay as they are and change no other token.

    A trace by fx does not know whether it will be called with masks: it holds these functions as nodes.
    """
    real = unpadded(x, WEIGHS in block.__dict__, **masks)
    return restored(block(filled(x, real)), x, real)


fx.wrap("unpadded")
fx.wrap("filled")
fx.wrap("restored")


def moved(edits: tuple[Edit, ...], old: fx.Graph, new: fx.Graph, module: nn.Module) -> tuple[Edit, ...]:
    """The edits of one graph, for another graph of the same forward: the place is found by the gated node or its users.

    Raises:
        Refusal: A place is not there, or not clear.
    """
    pairs = counterparts(old, new)
    known = set(pairs.values())
    index = {node: i for i, node in enumerate(new.nodes)}
    nodes = list(old.nodes)
    out = []
    for edit in edits:
        node = nodes[edit.node]
        users = list(node.users) if edit.users is None else [nodes[i] for i in edit.users]
        everyone = edit.users is None or set(users) == set(node.users)
        if node in pairs:
            there = {pairs[node]}
        else:  # the value that the users read there and that has no other counterpart
            there = {m for u in users if u in pairs for m in pairs[u].all_input_nodes if m not in known}
        (target,) = there if len(there) == 1 else (None,)
        if target is None or (any(u not in pairs for u in users) and not (everyone and node in pairs)):
            raise Refusal(
                f"{type(module).__name__}.forward has a branch in which the place of {edit.slot!r} cannot be found")
        everyone = everyone and node in pairs
        if not everyone and any(n.op == "call_module" or writes(n) for n in _readers_of_memory(target) if n not in known):
            raise Refusal(
                f"{type(module).__name__}.forward has a branch that may change the value of {edit.slot!r} in place")
        out.append(dataclasses.replace(
            edit, node=index[target], name=target.name,
            users=None if everyone else tuple(index[pairs[u]] for u in users)))
    return tuple(out)


def _readers_of_memory(node: fx.Node) -> set[fx.Node]:
    """The nodes that read a value or what may be in its memory."""
    while ops.of(node).memory == ops.VIEW or writes(node):
        source = node.kwargs.get("out", ops.argument(node, "input"))
        if not isinstance(source, fx.Node):
            break
        node = source
    readers, todo = set[fx.Node](), [node]
    while todo:
        new = [u for u in todo.pop().users if u not in readers]
        readers.update(new)
        todo += [u for u in new if u.op in ("call_function", "call_method") and (ops.of(u).memory != ops.NEW or writes(u))]
    return readers


def _set_graphs(module: nn.Module, graphs: dict[str, fx.Graph]) -> None:
    assert isinstance(module, fx.GraphModule)
    module.__dict__.update(graphs)
    module.recompile()


def apply_edits(
    module: nn.Module, edits: OwnerEdits, code: type[nn.Module] | dict[str, fx.Graph] | None,
    blocks: dict[str, nn.Module],
) -> None:  # fmt: skip
    """Put `blocks` into an owner, in place. `code` is its generated class or graphs, where it has some."""
    set_edits(module, edits)
    for edit in edits.edits:
        mark_inside(blocks[edit.slot])
        if edit.slot in module._modules:  # a registered slot keeps its place
            module._modules[edit.slot] = blocks[edit.slot]
            continue
        module.__dict__.pop(edit.slot, None)
        items = list(module._modules.items())
        at = [name for name, _ in items].index(edit.after) + 1 if edit.after else 0
        items.insert(at, (edit.slot, blocks[edit.slot]))
        module._modules.clear()
        module._modules.update(items)
    if isinstance(code, dict):
        _set_graphs(module, code)
    elif code is not None:
        set_class(module, code)


def undo_edits(module: nn.Module) -> None:
    """Give an owner back its class and its children, in place. What a block replaced gets its device, dtype and mode."""
    edits = edits_of(module)
    assert edits is not None
    set_edits(module, None)
    if isinstance(edits.original, nn.Module):
        block = module._modules[edits.edits[0].slot]
        assert block is not None
        edits.original.train(block.training)
        for p in itertools.islice(block.parameters(), 1):
            edits.original.to(p)
    if has_generated_class(module):
        set_class(module, base_class(module))
    for edit in edits.edits:
        if edits.kind == "fill" and edits.original_registered:
            module._modules[edit.slot] = edits.original
            continue
        module._modules.pop(edit.slot, None)
        if edits.kind == "fill":
            module.__dict__[edit.slot] = edits.original
    if edits.kind == "graph":
        _set_graphs(module, edits.original)


def device_near(module: nn.Module, model: nn.Module) -> torch.device:
    """The device of the weights of an owner, else of the model."""
    return next((p.device for source in (module, model) for p in source.parameters()), torch.device("cpu"))
