"""Which forwards can be rewritten, and the region of those that have to become one."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from ..capture.arguments import Unpacked
from ..capture.calls import Call
from ..dataflow.branches import branches
from ..dataflow.layers import is_layer
from ..dataflow.module_graph import ModuleGraph
from ..dataflow.value_flow import ValueFlow
from ..errors import Refusal


@dataclasses.dataclass(frozen=True, eq=False)
class Region:
    """A forward to rewrite, that of `root`, and the calls inside it that are inlined.

    A call is inlined with all calls between it and `root`.
    """

    root: Call
    inlined: frozenset[Call] = frozenset()

    @property
    def calls(self) -> frozenset[Call]:
        return self.inlined | {self.root}


def common_region(flow: ValueFlow, a: Call, b: Call) -> Region:
    """The smallest region with both calls.

    Raises:
        Refusal: One of its forwards cannot be rewritten or inlined.
    """
    chains = [_with_callers(a), _with_callers(b)]
    root = next(c for c in chains[0] if c in chains[1])
    inlined = {c for chain in chains for c in chain[:chain.index(root)]}
    for call in sorted({root, *inlined}, key=lambda c: c.begin):
        check_rewritable(flow, call, inlined=call is not root)
    return Region(root, frozenset(inlined))


def _with_callers(call: Call) -> list[Call]:
    chain = [call]
    while chain[-1].parent is not None:
        chain.append(chain[-1].parent)
    return chain


def check_rewritable(flow: ValueFlow, call: Call, *, inlined: bool) -> None:
    """
    Args:
        flow: The values of the recorded run.
        call: The call of a module.
        inlined: Whether the module's forward goes into another.

    Raises:
        Refusal: The module's forward cannot be rewritten, or not be inlined.
    """
    view = forward_of(flow, call) if inlined else flow.traces.view(call.module)
    name, path = f"{type(call.module).__name__}.forward", call.path or type(call.module).__name__
    if view is None:
        raise Refusal(flow.traces.failures.get(call.module, f"{name} is torch's own"))
    if len(flow.traces.calls[call.module]) > 1:
        raise Refusal(f"{path} is called more than once")
    check_plain(flow, call.module, path, may_have_hooks=not inlined)
    if branches(view.module, view.forward):
        raise Refusal(f"{name} branches on sizes")
    constants = view.forward.constants.values()
    if inlined and any(isinstance(v, Unpacked) for v in constants):
        raise Refusal(f"{name} takes a list")
    if any(v is not None and not isinstance(v, (bool, int, float, str, Unpacked)) for v in constants):
        raise Refusal(f"{name} depends on an argument that is no plain value")
    if any(str(n.target).startswith("*") for n in view.nodes if n.op == "placeholder"):
        raise Refusal(f"{name} takes any number of arguments")


def forward_of(flow: ValueFlow, call: Call) -> ModuleGraph | None:
    """The forward of a call to inline: torch's own layers have one, too. None where fx cannot follow it.

    Raises:
        Refusal: It is a layer's, and fx cannot follow it.
    """
    cls: Any = type(call.module)
    return flow.traces.inside(call) if is_layer(cls) else flow.traces.view(call.module)


def check_plain(flow: ValueFlow, module: nn.Module, name: str, *, may_have_hooks: bool = False) -> None:
    """
    Raises:
        Refusal: The module, called `name` in the message, does more than its class's forward: it has a forward of its own,
            or hooks, which may see or change its input and output.
    """
    if not may_have_hooks and module in (flow.barriers or ()):
        raise Refusal(f"{name} has hooks")
    if "forward" in module.__dict__:
        raise Refusal(f"{name} has a forward that is not its class's")
