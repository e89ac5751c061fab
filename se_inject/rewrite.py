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
import functools
import itertools
import linecache
import threading
from typing import Any

import torch
from torch import fx, nn

from .errors import SEInjectError, TraceError
from .paths import Path, counterparts, known_path, same_graph, same_paths, trace_paths
from .trace import Unpacked, abstract, copy_graph

_ERROR = "_se_error"


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
    fixed, `decisions` the way that it went where the forward branches on sizes. `original` is what stood in
    a filled slot: the module, or None with where it was kept; or the graphs of a GraphModule, by attribute.
    """

    way: str
    edits: tuple[Edit, ...]
    constants: tuple[tuple[str, Any], ...] = ()
    decisions: tuple[bool, ...] = ()
    original: Any = None
    original_registered: bool = False


def trace_modes(
    module: nn.Module, constants: dict[str, Any], known: Path | None = None
) -> tuple[list[Path], dict[str, Any]]:
    """Trace an owner for rewriting: the ways through its forward, and the arguments that they hold fixed.

    Arguments stay open where the forward does not branch on them. `known` is the only way in eval mode with
    `constants`, where it is at hand. `module` is not changed.

    Raises:
        TraceError: fx cannot follow the forward, or it differs between train and eval mode.
    """
    modes = [(m, m.training) for m in module.modules()]
    unpacked = {k: v for k, v in constants.items() if isinstance(v, Unpacked)}
    try:
        for m, _ in modes:
            m.__dict__["training"] = False
        paths = trace_paths(module, constants) if known is None else [known]
        free = None
        with contextlib.suppress(TraceError):
            free = paths if constants.keys() == unpacked.keys() else trace_paths(module, unpacked)
        if free is not None and same_paths(paths, free, constants):
            paths, fixed = free, {}
        else:
            fixed = {k: v for k, v in constants.items() if v is None or isinstance(v, (bool, int, float, str))}
            if len(fixed) + len(unpacked) < len(constants):
                raise TraceError(f"{type(module).__name__}.forward depends on an argument that is no plain value")
        for m, _ in modes:
            m.__dict__["training"] = True
        if not same_paths(paths, trace_paths(module, {**fixed, **unpacked}), {}):
            raise TraceError(f"{type(module).__name__}.forward differs between train and eval mode")
    finally:
        for m, training in modes:
            m.__dict__["training"] = training
    return paths, fixed


def generate_class(module: nn.Module, edits: OwnerEdits, known: fx.Graph | None = None) -> type[nn.Module]:
    """A subclass of `module`'s class whose forward calls the blocks. `module` is not changed.

    Owners of one class and equal code share one generated class. `known` is the trace that the edits were
    made for, where it is at hand and the forward has no other ways.

    Raises:
        TraceError: The forward cannot be traced, or is not the one that the edits were made for.
    """
    paths, fixed = _trace_without_blocks(module, edits, known)
    main = next((p.graph for p in paths if p.outcomes == edits.decisions), None)
    if main is None:
        raise TraceError(f"{_base(module).__name__}.forward is not the one that was rewritten")
    nodes = list(main.nodes)
    for edit in edits.edits:
        if edit.node >= len(nodes) or nodes[edit.node].name != edit.name:
            raise TraceError(
                f"{_base(module).__name__}.forward is not the one that was rewritten: "
                f"node {edit.node} should be {edit.name!r}")
    return _generate(module, edits, copy_graph(main), paths, fixed)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def regenerate(module: nn.Module) -> None:
    """Rewrite an owner anew, in place, after its author's code, or the user's, set an attribute that its forward may read.

    Raises:
        TraceError: The place of a block is not in the forward as it is now.
    """
    with _lock:  # fx patches nn.Module for all threads
        if hasattr(type(module), "_se_stale"):
            _regenerate(module)


_lock = threading.RLock()


def _regenerate(module: nn.Module) -> None:
    edits: OwnerEdits = module.__dict__["_se_edits"]
    paths, fixed = _trace_without_blocks(module, edits, None)
    old = type(module)._se_graph  # type: ignore[attr-defined]
    main = next((p for p in paths if p.outcomes == edits.decisions), paths[0])
    if main.graph is None:
        raise TraceError(main.error)
    moved = dataclasses.replace(edits, edits=_moved(edits.edits, old, main.graph, module), decisions=main.outcomes)
    cls = _generate(module, moved, copy_graph(main.graph), paths, fixed)
    module.__dict__["_se_edits"] = moved
    module.__class__ = cls


def _base(module: nn.Module) -> type[nn.Module]:
    base: type[nn.Module] = getattr(type(module), "_se_base", type(module))
    return base


def _trace_without_blocks(
    module: nn.Module, edits: OwnerEdits, known: fx.Graph | None
) -> tuple[list[Path], dict[str, Any]]:
    """Trace the author's own forward, whether or not the blocks are there: an owner may iterate its children."""
    children, cls = dict(module._modules), type(module)
    try:
        for edit in edits.edits:
            module._modules.pop(edit.slot, None)
        module.__class__ = _base(module)
        with abstract(module):
            return trace_modes(module, dict(edits.constants), None if known is None else known_path(known))
    finally:
        module.__class__ = cls
        module._modules.clear()
        module._modules.update(children)


def _moved(edits: tuple[Edit, ...], old: fx.Graph, new: fx.Graph, module: nn.Module) -> tuple[Edit, ...]:
    """The edits of one graph in another of the same forward: by the gated node, or by what uses it.

    Raises:
        TraceError: A place is not there, or not clear.
    """
    if not any(n.op == "call_module" for n in new.nodes):
        return ()  # an early return, where nothing of the unit is computed
    pairs = counterparts(old, new)
    taken = set(pairs.values())
    index = {node: i for i, node in enumerate(new.nodes)}
    nodes = list(old.nodes)
    out = []
    for edit in edits:
        node = nodes[edit.node]
        users = list(node.users) if edit.users is None else [nodes[i] for i in edit.users]
        everyone = edit.users is None or set(users) == set(node.users)
        if node in pairs:
            there = {pairs[node]}
        else:  # what the users read that is no counterpart of anything else
            there = {m for u in users if u in pairs for m in pairs[u].all_input_nodes if m not in taken}
        (target,) = there if len(there) == 1 else (None,)
        if target is None or (any(u not in pairs for u in users) and not (everyone and node in pairs)):
            raise TraceError(
                f"{type(module).__name__}.forward has another way in which the place of {edit.slot!r} is not to be found")
        out.append(dataclasses.replace(
            edit, node=index[target], name=target.name,
            users=None if everyone and node in pairs else tuple(index[pairs[u]] for u in users)))
    return tuple(out)


def _generate(
    module: nn.Module, edits: OwnerEdits, main: fx.Graph, paths: list[Path], fixed: dict[str, Any]
) -> type[nn.Module]:
    """The class for ways through a forward; `edits` are those of `main`, which is kept as it is."""
    base = _base(module)
    names: dict[str, Any] = {_ERROR: SEInjectError, **{f"_se_fixed_{name}": value for name, value in fixed.items()}}
    guards = "".join(
        f"    if {name} {'is not' if value is None or isinstance(value, bool) else '!='} _se_fixed_{name}:\n"
        f"        raise {_ERROR}('{base.__name__}.forward was rewritten for one value of {name}: '\n"
        f"            'eject(), then inject() the model in the way it is called')\n"
        for name, value in fixed.items())
    if len(paths) == 1:
        assert paths[0].graph is not None
        code = _edited(paths[0].graph, edits.edits).python_code("self")
        return _class_of(base, _with_guards(code.src, guards), {**code.globals, **names}, main, edits.decisions)
    functions: list[str] = []
    head, call = _head(main)

    def define(graph: fx.Graph, name: str) -> None:
        code = graph.python_code("self")
        if any(names.setdefault(k, v) is not v for k, v in code.globals.items()):
            raise TraceError(f"{base.__name__}.forward gives one name to two things in its ways")
        functions.append(code.src.replace("def forward(", f"def {name}(", 1))

    def branch(prefix: tuple[bool, ...], indent: str) -> str:
        here = [p for p in paths if p.outcomes[:len(prefix)] == prefix]
        if len(here) == 1 and here[0].outcomes == prefix:
            name = f"_se_way_{paths.index(here[0])}"
            if here[0].graph is None:
                return f"{indent}raise {_ERROR}({here[0].error!r})\n"
            define(_edited(here[0].graph, _moved(edits.edits, main, here[0].graph, module)), name)
            return f"{indent}return self.{name}({call})\n"
        name = f"_se_test_{len(functions)}"
        define(_condition(here[0].conditions[len(prefix)], base), name)
        return (f"{indent}if self.{name}({call}):\n{branch((*prefix, True), indent + '    ')}"
                f"{branch((*prefix, False), indent)}")

    body = branch((), "    ")
    source = "\n\n".join([*functions, f"{head}\n{guards}{body}"])
    return _class_of(base, source, names, main, edits.decisions)


def _head(graph: fx.Graph) -> tuple[str, str]:
    """The first line of a graph's code, and the arguments to call it with."""
    src = graph.python_code("self").src
    head = next(line for line in src.splitlines() if line.startswith("def forward("))
    names = [str(n.target) if str(n.target).startswith("*") else n.name for n in graph.nodes if n.op == "placeholder"]
    return head, ", ".join(names)


def _condition(node: fx.Node, base: type[nn.Module]) -> fx.Graph:
    """A graph that computes a condition from the arguments.

    Raises:
        TraceError: It depends on what the owner's children compute.
    """
    needed: set[fx.Node] = set()
    ways = [node]
    while ways:
        n = ways.pop()
        if n.op == "call_module":
            raise TraceError(f"{base.__name__}.forward branches on what its layers compute")
        if n not in needed:
            needed.add(n)
            ways += n.all_input_nodes
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for n in node.graph.nodes:
        if n in needed or n.op == "placeholder":
            copies[n] = graph.node_copy(n, copies.__getitem__)
    graph.output(copies[node])
    return graph


def _edited(graph: fx.Graph, edits: tuple[Edit, ...]) -> fx.Graph:
    """`graph` with the blocks called; it is changed."""
    nodes = list(graph.nodes)
    for edit in edits:
        _insert(graph, nodes, edit)
    graph.lint()
    return graph


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
            new[graph] = _edited(copy_graph(graph), edits.edits)
    return {key: new[graph] for key, graph in kept.items()}


def _set_graphs(module: nn.Module, graphs: dict[str, fx.Graph]) -> None:
    assert isinstance(module, fx.GraphModule)
    module.__dict__.update(graphs)
    module.recompile()


_classes: dict[tuple[Any, ...], type[nn.Module]] = {}
_numbers = itertools.count(1)


def _class_of(
    base: type[nn.Module], source: str, names: dict[str, Any], graph: fx.Graph, decisions: tuple[bool, ...]
) -> type[nn.Module]:
    """The class with the functions of `source` for its methods; `graph` is what its author's forward does where it
    goes by `decisions`."""
    key = (base, source, decisions, tuple(sorted((k, id(v)) for k, v in names.items())))
    if key not in _classes:
        filename = f"<se_inject {base.__name__} {next(_numbers)}>"
        # the source stays readable: for tracebacks, and for torch.jit.script
        linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
        namespace = dict(names)
        exec(compile(source, filename, "exec"), namespace)
        methods = {k: v for k, v in namespace.items() if k == "forward" or k.startswith(("_se_way_", "_se_test_"))}
        _classes[key] = _derived(base, {**methods, "_se_graph": graph, "__setattr__": _set_attribute})
    return _classes[key]


def _derived(base: type[nn.Module], members: dict[str, Any]) -> type[nn.Module]:
    own = {name for cls in base.__mro__ if cls not in (nn.Module, object) for name in cls.__dict__}
    copying = {} if own & {"__getstate__", "__deepcopy__", "__copy__"} else {"__deepcopy__": _deepcopy, "__copy__": _copy}
    return type(base.__name__, (base,), {
        "__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__, "_se_base": base,
        "__reduce_ex__": _reduce, **copying, **members,
    })  # fmt: skip


def _set_attribute(self: nn.Module, name: str, value: Any) -> None:
    """Set it; and as the author's forward may read it, where the trace holds what it was, rewrite anew before the next call."""
    cls: Any = type(self)
    old = getattr(self, name, None)
    cls._se_base.__setattr__(self, name, value)
    if "_se_graph" in cls.__dict__ and name not in _OF_MODULES and not _traces_alike(old, value):
        self.__class__ = _stale(cls)


_OF_MODULES = {  # what torch sets on modules
    "__class__", "training", "_is_replica", "_former_parameters", "_is_full_backward_hook", "_compiled_call_impl"}


def _traces_alike(old: Any, new: Any) -> bool:
    """Whether a trace is the same for two values of an attribute: it reads tensors and children by their names."""
    if isinstance(old, torch.Tensor) or isinstance(new, torch.Tensor):
        return isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor) and old.shape == new.shape
    if isinstance(old, nn.Module) or isinstance(new, nn.Module):
        return type(old) is type(new)
    plain = (bool, int, float, str, type(None))
    return type(old) is type(new) and isinstance(new, plain) and bool(old == new)


@functools.cache
def _stale(cls: Any) -> type[nn.Module]:
    """The class of an owner whose attributes were set since its forward was generated as `cls`."""
    return _derived(cls._se_base, {"forward": _forward_anew, "_se_stale": True, "_se_graph": cls._se_graph})


def _forward_anew(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    regenerate(self)
    return self.forward(*args, **kwargs)


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """Pickle by the original class and the edits: a class made at run time has no name to import."""
    regenerate(self)
    return _new, (self._se_base,), self.__getstate__(), None, None, _set_state


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
    module.__dict__["_se_edits"] = edits
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
    if isinstance(code, dict):
        _set_graphs(module, code)
    elif code is not None:
        module.__class__ = code


def undo_edits(module: nn.Module) -> None:
    """Give an owner back its class and its children, in place."""
    edits: OwnerEdits = module.__dict__.pop("_se_edits")
    if "_se_base" in type(module).__dict__:
        module.__class__ = _base(module)
    for edit in edits.edits:
        if edits.way == "fill" and edits.original_registered:
            module._modules[edit.slot] = edits.original
            continue
        module._modules.pop(edit.slot, None)
        if edits.way == "fill":
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


