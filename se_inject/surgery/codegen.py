"""The forward of an owner that calls its blocks, generated: in a subclass of its own class, or as a new graph."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from ..blocks.masks import MASKS
from ..capture.arguments import bound, signature_of
from ..capture.calls import REST, Call
from ..capture.graphs import same_graph, sources_of, subgraph
from ..capture.snapshot import all_or_nothing, on_meta, set_class
from ..capture.tracer import IN_PLACE
from ..dataflow.branches import Branch, known_branch
from ..dataflow.ops import draws, writes
from ..errors import Refusal, SEInjectError, TraceError
from ..undo import entered, surgery_lock, undone
from .edits import check_forms, moved, put_in
from .generated_class import ERROR_NAME, derived, generated, guards_for, new_of, with_guards
from .modes import Modes, in_train_mode, trace_modes
from .sequential import sequential_class
from .state import BASE, Edit, OwnerEdits, base_class, edits_of, set_edits


def generate(
    module: nn.Module, edits: OwnerEdits, known: fx.Graph | None = None, calls: Sequence[Call] = ()
) -> type[nn.Module] | dict[str, fx.Graph] | None:
    """The code that an owner needs to call its blocks: a class, graphs, or nothing. `module` is not changed.

    `known` and `calls` are those of `generate_class`.

    Raises:
        Refusal: As `generate_class` and `generate_graphs`.
    """
    if isinstance(module, fx.GraphModule):
        return generate_graphs(module, edits)
    if edits.kind == "insert":
        return sequential_class(base_class(module))
    return generate_class(module, edits, known, calls) if edits.kind == "rewrite" else None


def generate_class(
    module: nn.Module, edits: OwnerEdits, known: fx.Graph | None = None, calls: Sequence[Call] = ()
) -> type[nn.Module]:  # fmt: skip
    """A subclass of `module`'s class whose forward calls the blocks. `module` is not changed.

    Owners of one class and equal code share one generated class. `known` is the trace that the edits were
    made for, where it is at hand and the forward has no other branches; `calls` are further calls that it must take.

    Raises:
        Refusal: The forward cannot be traced, is not the one that the edits were made for, or is called with several values
            of an argument that it branches on.
    """
    modes = _trace_without_blocks(module, edits, known)
    main = next((p.graph for p in modes.branches if p.outcomes == edits.decisions), None)
    if main is None:
        raise Refusal(f"{base_class(module).__name__}.forward is not the one that was rewritten")
    nodes = list(main.nodes)
    for edit in edits.edits:
        if edit.node >= len(nodes) or nodes[edit.node].name != edit.name:
            raise Refusal(
                f"{base_class(module).__name__}.forward is not the one that was rewritten: "
                f"node {edit.node} should be {edit.name!r}")
    _check_calls(module, modes, calls)
    return _generate(module, edits, subgraph(main), modes)


def _check_calls(module: nn.Module, modes: Modes, calls: Sequence[Call]) -> None:
    """Raise where the guards of a generated forward would, in one of these calls.

    Raises:
        Refusal: They would.
    """
    name = base_class(module).__name__
    guards, names = guards_for(modes.fixed, modes.given, f"{name}.forward branches on {{name}}, and its calls differ in that")
    for call in calls:
        try:
            exec(textwrap.dedent(guards), {**names, **bound(call)[1]})
        except (SEInjectError, RuntimeError, TypeError, ValueError) as error:  # a tensor compares with no number
            raise Refusal(str(error)) from error


@torch.compiler.disable  # type: ignore[untyped-decorator]
def regenerate(module: nn.Module) -> None:
    """Rewrite a stale owner again, in place: code of its author or of the user set an attribute that its forward may read.

    Raises:
        TraceError: The place of a block is not in the forward as it is now.
    """
    with entered(surgery_lock):
        if "_se_stale" in type(module).__dict__:
            with told_to_user(module), all_or_nothing(module):
                _regenerate(module)
        elif hasattr(type(module), "_se_stale"):
            raise TraceError(
                f"{base_class(module).__name__}: an attribute of it was set, and before its next call its class was changed "
                "(by fully_shard, say): run the model once in between")


@contextlib.contextmanager
def told_to_user(module: nn.Module) -> Iterator[None]:
    """Inside, a refusal becomes an error for the user: the owner has blocks already, and cannot be left out."""
    try:
        yield
    except Refusal as refusal:
        raise TraceError(
            f"the blocks in a {base_class(module).__name__} cannot be called any more: {refusal}; undo what was changed in it "
            "since the injection, or eject() the model") from refusal


def _regenerate(module: nn.Module) -> None:
    edits = edits_of(module)
    assert edits is not None
    modes = _trace_without_blocks(module, edits, None)
    old = type(module)._se_graph  # type: ignore[attr-defined]
    main = next((p for p in modes.branches if p.outcomes == edits.decisions), modes.branches[0])
    if main.graph is None:
        raise Refusal(main.error)
    new = dataclasses.replace(edits, edits=moved(edits.edits, old, main.graph, module), decisions=main.outcomes)
    cls = _generate(module, new, subgraph(main.graph), modes)
    set_edits(module, new)
    set_class(module, cls)


def _trace_without_blocks(
    module: nn.Module, edits: OwnerEdits, known: fx.Graph | None
) -> Modes:  # fmt: skip
    """Trace the author's own forward with the blocks taken out, as an owner may iterate its children."""
    children, cls = dict(module._modules), type(module)

    def put_back() -> None:
        set_class(module, cls)
        module._modules.clear()
        module._modules.update(children)

    with undone(put_back):
        for edit in edits.edits:
            module._modules.pop(edit.slot, None)
        set_class(module, base_class(module))
        with on_meta(module):
            return trace_modes(module, dict(edits.constants), None if known is None else known_branch(known), edits.forms)


def _generate(
    module: nn.Module, edits: OwnerEdits, main: fx.Graph, modes: Modes
) -> type[nn.Module]:  # fmt: skip
    """The class for the branches of a forward; `edits` are those of `main`, which stays as it is."""
    base = base_class(module)
    if any(p.kind is p.POSITIONAL_ONLY for p in list(signature_of(base.forward).parameters.values())[1:]):
        raise Refusal(f"{base.__name__}.forward has positional-only parameters, which a generated forward does not have")
    guards, names = guards_for(modes.fixed, modes.given, f"{base.__name__}.forward was rewritten for one value of {{name}}: "
                            "eject(), then inject() the model as it is called")
    functions: list[str] = []
    head, call = _head(main)

    def define(graph: fx.Graph, name: str, guards: str = "") -> None:
        check_forms(graph, dict(edits.forms))
        code = graph.python_code("self")
        if any(names.setdefault(k, v) is not v for k, v in code.globals.items()):
            raise Refusal(f"{base.__name__}.forward gives one name to two things in its branches")
        source = code.src.replace("def forward(", f"def {name}(", 1).replace(f"{REST} = ", "**")
        functions.append(with_guards(source, guards))

    def place(graph: fx.Graph, training: bool) -> tuple[Edit, ...]:
        if training:
            return in_train_mode(edits.edits, main, graph, module)
        return edits.edits if len(modes.branches) == 1 else moved(edits.edits, main, graph, module)

    def define_forward(name: str, guards: str, masks: tuple[str, ...] = ()) -> None:
        if modes.training:
            define_mode(f"_se_train_{name}", "", masks, modes.training, training=True)
            guards += f"    if self.training:\n        return self._se_train_{name}({call})\n"
        define_mode(name, guards, masks, modes.branches, training=False)

    def define_mode(name: str, guards: str, masks: tuple[str, ...], paths: list[Branch], training: bool) -> None:
        if len(paths) == 1:
            graph = paths[0].graph
            assert graph is not None
            define(put_in(subgraph(graph), place(graph, training), masks), name, guards)
            return

        def branch(prefix: tuple[bool, ...], indent: str) -> str:
            here = [p for p in paths if p.outcomes[:len(prefix)] == prefix]
            if len(here) == 1 and here[0].outcomes == prefix:
                graph = here[0].graph
                if graph is None:
                    return f"{indent}raise {ERROR_NAME}({here[0].error!r})\n"
                part = f"_se_branch_{len(functions)}"
                works = any(n.op == "call_module" for n in graph.nodes)  # else an early return, where there is nothing to gate
                define(put_in(subgraph(graph), place(graph, training), masks) if works else graph, part)
                return f"{indent}return self.{part}({call})\n"
            test = f"_se_test_{len(functions)}"
            define(_condition(here[0].conditions[len(prefix)], base), test)
            return (f"{indent}if self.{test}({call}):\n{branch((*prefix, True), indent + '    ')}"
                    f"{branch((*prefix, False), indent)}")

        body = branch((), "    ")
        functions.append(f"{head.replace('def forward(', f'def {name}(', 1)}\n{guards}{body}")

    masks = tuple(str(n.target) for n in main.nodes if n.op == "placeholder" and n.target in MASKS.keys() - modes.fixed.keys())
    if masks:
        refusal = f"TorchScript leaves out no padding: call the model without {' and '.join(masks)}"
        guards += (f"    if {' or '.join(f'{name} is not None' for name in masks)}:\n"
                   f"        if is_scripting():\n            raise {ERROR_NAME}({refusal!r})\n"
                   f"        else:\n            return self._se_masked({call})\n")
        names["is_scripting"] = torch.jit.is_scripting
        define_forward("_se_masked", "", masks)
    define_forward("forward", guards)
    return _class_of(base, "\n\n".join(functions), names, main, edits.decisions)


def _head(graph: fx.Graph) -> tuple[str, str]:
    """The first line of a graph's code, and the arguments to call it with."""
    src = graph.python_code("self").src
    head = next(line for line in src.splitlines() if line.startswith("def forward("))
    names: list[str] = []
    for n in graph.nodes:
        if n.op == "placeholder":
            target = str(n.target)
            keyword_only = any(name.startswith("*") for name in names)
            names.append(f"{target}={target}" if keyword_only and not target.startswith("*") else target)
    return head, ", ".join(names)


def _condition(node: fx.Node, base: type[nn.Module]) -> fx.Graph:
    """A graph that computes a condition from the arguments.

    Raises:
        Refusal: It depends on what the owner's children compute, or on operators that must not run twice.
    """
    needed = sources_of(node)
    if any(writes(n) or draws(n) for n in needed):
        raise Refusal(f"{base.__name__}.forward branches on a tensor that it has changed in place, or drawn")
    if any(n.op == "call_module" for n in needed):
        raise Refusal(f"{base.__name__}.forward branches on what its layers compute")
    graph = subgraph(node.graph, needed, node)
    for n in graph.nodes:
        n.target = IN_PLACE.get(n.target, n.target)  # the branch that is taken writes
    return graph


def generate_graphs(module: fx.GraphModule, edits: OwnerEdits) -> dict[str, fx.Graph]:
    """New graphs for a GraphModule, by attribute; torchvision's keeps one for each mode. `module` is not changed.

    Raises:
        Refusal: Its graphs differ.
    """
    new: dict[fx.Graph, fx.Graph] = {}
    kept = {key: graph for key, graph in module.__dict__.items() if isinstance(graph, fx.Graph)}
    for graph in kept.values():
        if not same_graph(module.graph, graph, {}):
            raise Refusal("this GraphModule has graphs for train and eval mode that differ")
        if graph not in new:
            new[graph] = put_in(subgraph(graph), edits.edits, tuple(MASKS))
    return {key: new[graph] for key, graph in kept.items()}


def _class_of(
    base: type[nn.Module], source: str, names: dict[str, Any], graph: fx.Graph, decisions: tuple[bool, ...]
) -> type[nn.Module]:
    """The class with the functions of `source` for methods. `graph` is the author's forward on the branch of `decisions`."""
    members = {"_se_graph": graph, "__setattr__": _set_attribute, "__reduce_ex__": _reduce}
    return generated(base, [(source, names)], members, decisions)


def _set_attribute(self: nn.Module, name: str, value: Any) -> None:
    """Set the attribute and mark the owner stale: the generated forward has the old value baked in, so it is regenerated
    before the next call."""
    cls: Any = type(self)
    of_module = name in _OF_MODULES or (name.startswith("__") and name.endswith("__"))  # torch.jit.script: __overloads__
    if "_se_graph" in cls.__dict__ and not of_module and not _traces_alike(
            getattr(self, name, None), value):
        set_class(self, _stale(cls))  # first, so that an interrupt leaves no forward with the old value
    base_class(self).__setattr__(self, name, value)


_OF_MODULES = {  # what torch and transformers set on modules
    "_is_hf_initialized",
    "training", "_is_replica", "_former_parameters", "_is_full_backward_hook", "_compiled_call_impl",
    "_is_fsdp_managed_module", "_fsdp_use_orig_params", "_is_torch_compile"}


def _traces_alike(old: Any, new: Any) -> bool:
    """Whether a trace is the same for two values of an attribute; it reads tensors and children by name."""
    if isinstance(old, torch.Tensor) or isinstance(new, torch.Tensor):
        return isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor) and old.shape == new.shape
    if isinstance(old, nn.Module) or isinstance(new, nn.Module):
        return type(old) is type(new)
    plain = (bool, int, float, str, type(None))
    return type(old) is type(new) and isinstance(new, plain) and bool(old == new)


@functools.cache
def _stale(cls: Any) -> type[nn.Module]:
    """The class of a stale owner, whose forward was generated as `cls`."""
    return derived(getattr(cls, BASE), {
        "forward": _regenerated_forward, "_se_stale": True, "_se_graph": cls._se_graph, "__reduce_ex__": _reduce})


def _regenerated_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    regenerate(self)
    return self.forward(*args, **kwargs)


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """Pickle by the original class and the edits: a class made at run time has no name to import."""
    regenerate(self)
    return new_of, (base_class(self),), self.__getstate__(), None, None, _set_state


def _set_state(module: nn.Module, state: dict[str, Any]) -> None:
    module.__setstate__(dict(state))
    edits = edits_of(module)
    assert edits is not None
    with told_to_user(module):
        code = generate(module, edits)
    assert isinstance(code, type)
    set_class(module, code)
