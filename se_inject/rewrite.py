"""Rewrite the modules that own sites, so that their forward calls the new blocks.

Four ways, the lightest that serves: an empty slot is filled and the author's own forward calls it;
a plain `nn.Sequential` gets the block as one more child; an `fx.GraphModule` gets a new graph; any other
owner gets a subclass of its own class whose forward is generated from its traced graph. The weights and
their names stay where they are.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import linecache
from typing import Any

import torch
from torch import fx, nn

from .errors import SEInjectError, TraceError
from .trace import Unpacked, copy_graph, trace_forward

_NONE = "_se_none"


@dataclasses.dataclass(frozen=True)
class Edit:
    """One block in one owner.

    `after` is the child that it is registered behind, as its author would have written it; empty is
    the first place. `node` is the position of the gated node in the owner's traced graph, `name` its
    name there (a check), and `users` the positions of the nodes that get the gated value; None is all.
    """

    slot: str
    after: str
    node: int = 0
    name: str = ""
    users: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class OwnerEdits:
    """All that is done to one owner; kept on it as ``_se_edits``, so that it can be undone and rebuilt.

    `way` is ``fill``, ``insert``, ``graph`` or ``rewrite``. `constants` are the arguments that the trace held
    fixed. `original` is what stood in a filled slot: the module, or None with where it was kept; or the
    graphs of a GraphModule, by attribute.
    """

    way: str
    edits: tuple[Edit, ...]
    constants: tuple[tuple[str, Any], ...] = ()
    original: Any = None
    original_registered: bool = False


def same_graph(a: fx.Graph, b: fx.Graph, constants: dict[str, Any]) -> bool:
    """Whether two traces of one forward do the same; in `b` a placeholder may stand for its constant."""
    pairs: dict[fx.Node, fx.Node] = {}

    def same(x: Any, y: Any) -> bool:
        if isinstance(x, fx.Node) and isinstance(y, fx.Node):
            return pairs.get(x) is y
        if isinstance(y, fx.Node):
            if y.op != "placeholder" or y.target not in constants:
                return False
            return x is constants[y.target] or (type(x) is type(constants[y.target]) and x == constants[y.target])
        if isinstance(x, (list, tuple)) and isinstance(y, (list, tuple)):
            return len(x) == len(y) and all(map(same, x, y))
        if isinstance(x, dict) and isinstance(y, dict):
            return x.keys() == y.keys() and all(same(x[k], y[k]) for k in x)
        if isinstance(x, slice) and isinstance(y, slice):
            return same((x.start, x.stop, x.step), (y.start, y.stop, y.step))
        return type(x) is type(y) and bool(x == y)

    if len(a.nodes) != len(b.nodes):
        return False
    for x, y in zip(a.nodes, b.nodes):
        if x.op != y.op or x.target != y.target or not same(x.args, y.args) or not same(x.kwargs, y.kwargs):
            return False
        pairs[x] = y
    return True


def trace_modes(
    module: nn.Module, constants: dict[str, Any], known: fx.Graph | None = None
) -> tuple[fx.Graph, dict[str, Any]]:
    """Trace an owner for rewriting: the graph, and the arguments that it holds fixed.

    Arguments stay open where the forward does not branch on them. `known` is a trace in eval mode with
    `constants`, where there is one. `module` and `known` are not changed.

    Raises:
        TraceError: fx cannot follow the forward, or it differs between train and eval mode.
    """
    modes = [(m, m.training) for m in module.modules()]
    unpacked = {k: v for k, v in constants.items() if isinstance(v, Unpacked)}
    try:
        for m, _ in modes:
            m.__dict__["training"] = False
        graph = trace_forward(module, constants) if known is None else copy_graph(known)
        free = None
        with contextlib.suppress(TraceError):
            free = graph if constants.keys() == unpacked.keys() else trace_forward(module, unpacked)
        if free is not None and same_graph(graph, free, constants):
            graph, fixed = free, {}
        else:
            fixed = {k: v for k, v in constants.items() if v is None or isinstance(v, (bool, int, float, str))}
            if len(fixed) + len(unpacked) < len(constants):
                raise TraceError(f"{type(module).__name__}.forward depends on an argument that is no plain value")
        for m, _ in modes:
            m.__dict__["training"] = True
        if not same_graph(graph, trace_forward(module, {**fixed, **unpacked}), {}):
            raise TraceError(f"{type(module).__name__}.forward differs between train and eval mode")
    finally:
        for m, training in modes:
            m.__dict__["training"] = training
    return graph, fixed


def generate_class(module: nn.Module, edits: OwnerEdits, known: fx.Graph | None = None) -> type[nn.Module]:
    """A subclass of `module`'s class whose forward calls the blocks. `module` is not changed.

    Owners of one class and equal code share one generated class. `known` is the trace that the edits were
    made for, where it is at hand.

    Raises:
        TraceError: The forward cannot be traced, or is not the one that the edits were made for.
    """
    base = type(module)
    children = dict(module._modules)
    try:
        for edit in edits.edits:  # on unpickling the blocks are there already, and an owner may iterate its children
            module._modules.pop(edit.slot, None)
        graph, fixed = trace_modes(module, dict(edits.constants), known)
    finally:
        module._modules.clear()
        module._modules.update(children)
    nodes = list(graph.nodes)
    for edit in edits.edits:
        if edit.node >= len(nodes) or nodes[edit.node].name != edit.name:
            raise TraceError(
                f"{base.__name__}.forward is not the one that was rewritten: node {edit.node} should be {edit.name!r}")
    for edit in edits.edits:
        _insert(graph, nodes, edit)
    graph.lint()
    code = graph.python_code("self")
    guards = "".join(
        f"    if {name} {'is not' if value is None or isinstance(value, bool) else '!='} {value!r}:\n"
        f"        raise {_NONE}('{base.__name__}.forward was rewritten for {name}={value!r}: '\n"
        f"            'eject(), then inject() the model in the way it is called')\n"
        for name, value in fixed.items())
    source = _with_guards(code.src, guards)
    return _class_of(base, source, {**code.globals, _NONE: SEInjectError})


def _with_guards(source: str, guards: str) -> str:
    if not guards:
        return source
    head, sep, body = source.partition("):\n")
    if not sep:
        head, sep, body = source.partition(":\n")
    return head + sep + guards + body


def _insert(graph: fx.Graph, nodes: list[fx.Node], edit: Edit) -> None:
    node = nodes[edit.node]
    after = node
    if node.op == "placeholder":
        after = [n for n in graph.nodes if n.op == "placeholder"][-1]
    with graph.inserting_after(after):
        call = graph.call_module(edit.slot, (node,))
    if edit.users is None:
        node.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)
    else:
        for i in edit.users:
            nodes[i].replace_input_with(node, call)


def generate_graphs(module: fx.GraphModule, edits: OwnerEdits) -> dict[str, fx.Graph]:
    """New graphs for a GraphModule, by attribute; torchvision's keeps one for each mode. `module` is not changed.

    Raises:
        TraceError: Its graphs differ.
    """
    new: dict[fx.Graph, fx.Graph] = {}
    kept = {key: graph for key, graph in module.__dict__.items() if isinstance(graph, fx.Graph)}
    for graph in kept.values():
        if not same_graph(module.graph, graph, {}):
            raise TraceError("this GraphModule has graphs for train and eval mode that differ")
        if graph not in new:
            new[graph] = copy_graph(graph)
            nodes = list(new[graph].nodes)
            for edit in edits.edits:
                _insert(new[graph], nodes, edit)
            new[graph].lint()
    return {key: new[graph] for key, graph in kept.items()}


def _set_graphs(module: nn.Module, graphs: dict[str, fx.Graph]) -> None:
    assert isinstance(module, fx.GraphModule)
    module.__dict__.update(graphs)
    module.recompile()


_classes: dict[tuple[Any, ...], type[nn.Module]] = {}
_numbers = itertools.count(1)


def _class_of(base: type[nn.Module], source: str, names: dict[str, Any]) -> type[nn.Module]:
    key = (base, source, tuple(sorted((k, id(v)) for k, v in names.items())))
    if key not in _classes:
        filename = f"<se_inject {base.__name__} {next(_numbers)}>"
        # the source stays readable: for tracebacks, and for torch.jit.script
        linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
        namespace = dict(names)
        exec(compile(source, filename, "exec"), namespace)
        _classes[key] = type(base.__name__, (base,), {
            "__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__,
            "forward": namespace["forward"], "_se_base": base,
            "__reduce_ex__": _reduce, "__deepcopy__": _deepcopy, "__copy__": _copy,
        })
    return _classes[key]


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """Pickle by the original class and the edits: a class made at run time has no name to import."""
    state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
    return _new, (self._se_base,), state, None, None, _set_state


def _new(base: type[nn.Module]) -> nn.Module:
    return base.__new__(base)


def _set_state(module: nn.Module, state: dict[str, Any]) -> None:
    module.__setstate__(dict(state))
    module.__class__ = generate_class(module, module.__dict__["_se_edits"])


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    new = type(self).__new__(type(self))
    memo[id(self)] = new
    new.__dict__.update(copy.deepcopy(self.__dict__, memo))
    return new


def _copy(self: nn.Module) -> nn.Module:
    new = type(self).__new__(type(self))
    new.__dict__.update(self.__dict__)
    return new


def apply_edits(
    module: nn.Module, edits: OwnerEdits, code: type[nn.Module] | dict[str, fx.Graph] | None,
    blocks: dict[str, nn.Module],
) -> None:  # fmt: skip
    """Put `blocks` into an owner, in place. `code` is its generated class or graphs, where it has some."""
    for edit in edits.edits:
        if edit.slot in module._modules:  # a registered slot keeps its place
            module._modules[edit.slot] = blocks[edit.slot]
            continue
        module.__dict__.pop(edit.slot, None)
        items = list(module._modules.items())
        at = [name for name, _ in items].index(edit.after) + 1 if edit.after else 0
        items.insert(at, (edit.slot, blocks[edit.slot]))
        module._modules.clear()
        module._modules.update(items)
    module.__dict__["_se_edits"] = edits
    if isinstance(code, dict):
        _set_graphs(module, code)
    elif code is not None:
        module.__class__ = code


def undo_edits(module: nn.Module) -> None:
    """Give an owner back its class and its children, in place."""
    edits: OwnerEdits = module.__dict__.pop("_se_edits")
    if edits.way == "rewrite":
        module.__class__ = type(module)._se_base  # type: ignore[attr-defined]
    for edit in edits.edits:
        if edits.way != "fill":
            del module._modules[edit.slot]
        elif edits.original_registered:
            module._modules[edit.slot] = edits.original
        else:
            del module._modules[edit.slot]
            setattr(module, edit.slot, edits.original)
    if edits.way == "graph":
        _set_graphs(module, edits.original)


def edited_owners(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if "_se_edits" in m.__dict__]


def parameters_near(module: nn.Module, model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the weights of an owner, else of the model."""
    for source in (module, model):
        for p in source.parameters():
            if p.is_floating_point():
                return p.device, p.dtype
    return torch.device("cpu"), torch.get_default_dtype()


