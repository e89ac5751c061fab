"""The job at each owner: the edits for its sites, its generated code, and the blocks that go in."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Hashable
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from ..blocks.build import BlockSpec, make_block
from ..capture.arguments import variadic_keywords
from ..capture.fingerprint import frozen
from ..capture.forward import form_of, is_plain_sequential
from ..config import SEConfig
from ..dataflow.module_graph import TracedModel
from ..errors import Refusal
from ..find.places import PlacedSite
from ..find.slots import takes_activation
from .codegen import generate
from .edits import device_near
from .state import Edit, OwnerEdits


@dataclasses.dataclass(eq=False)
class Job:
    """One owner to rewrite: its edits, its generated class, and its sites."""

    module: nn.Module
    edits: OwnerEdits
    code: type[nn.Module] | dict[str, fx.Graph] | None
    found: list[PlacedSite]


def owner_jobs(found: list[PlacedSite], traces: TracedModel) -> list[Job]:
    """Group the sites by owner and generate the owners' code; a site whose owner refuses gets a reason."""
    owners: dict[nn.Module, list[PlacedSite]] = defaultdict(list)
    for s in found:
        if s.site.reason is None:
            owners[s.view.module].append(s)
    jobs: list[Job] = []
    made: dict[Hashable, type[nn.Module] | dict[str, fx.Graph] | Refusal | None] = {}
    for module, group in owners.items():
        edits = _edits(module, group)
        others = traces.calls[module][1:]
        key = (traces.fingerprints.of(module), edits.edits, frozen(edits.constants), edits.decisions, edits.forms,
               tuple(frozen((c.args, c.kwargs)) for c in others))
        if key not in made:
            try:
                forward = group[0].view.forward
                made[key] = generate(module, edits, None if forward.decisions else forward.graph, others)
            except Refusal as error:
                made[key] = error
        code = made[key]
        if isinstance(code, Refusal):
            for s in group:
                s.site = dataclasses.replace(s.site, reason=str(code))
            continue
        jobs.append(Job(module, edits, code, group))
    return jobs


def _edits(module: nn.Module, group: list[PlacedSite]) -> OwnerEdits:
    first = group[0]
    after = [_child_before(s) for s in group]
    if first.place.fill is not None:
        slot = first.site.slot
        registered = slot in module._modules
        original = module._modules[slot] if registered else module.__dict__[slot]
        return OwnerEdits("fill", (Edit(slot, after[0]),), original=original, original_registered=registered)
    if is_plain_sequential(module):
        return OwnerEdits("insert", tuple(Edit(s.site.slot, child) for s, child in zip(group, after)))
    index = first.view.index
    edits = tuple(
        Edit(s.site.slot, child, index[s.place.node], s.place.node.name,
             None if s.place.users is None else tuple(index[u] for u in s.place.users))
        for s, child in zip(group, after))
    if isinstance(module, fx.GraphModule):
        graphs = {key: graph for key, graph in module.__dict__.items() if isinstance(graph, fx.Graph)}
        return OwnerEdits("graph", edits, original=graphs)
    forward = first.view.forward
    return OwnerEdits(
        "rewrite", edits, tuple(forward.constants.items()), forward.decisions, forms=_forms(module, forward.graph))


def _forms(module: nn.Module, graph: fx.Graph) -> tuple[tuple[str, str], ...]:
    """The form of what each child returned, of which the trace holds decisions, where the forward has ``**kwargs``.

    A child that returned an object is left out, as attributes have no form.
    """
    if variadic_keywords(type(module)) is None:
        return ()
    found = [(str(n.target), n.meta["val"]) for n in graph.nodes if n.op == "call_module"]
    plain = (torch.Tensor, bool, int, float, str, type(None))
    objects = {target for target, value in found if not all(isinstance(v, plain) for v in tree_leaves(value))}
    return tuple(dict.fromkeys((target, form_of(value)) for target, value in found if target not in objects))


def _child_before(s: PlacedSite) -> str:
    """The owner's child that is called last before a site."""
    names = (str(n.target).partition(".")[0] for n in s.view.calls_before(s.place.node))
    return next((name for name in names if name in s.view.module._modules and name != s.site.slot), "")


def make_block_for(found: PlacedSite, owner: nn.Module, model: nn.Module, config: SEConfig) -> nn.Module:
    """The block of a site, on the device of the weights around it and of the dtype of the value that it gates."""
    site = found.site
    device, dtype = device_near(owner, model), found.place.node.meta["val"].dtype
    spec = BlockSpec(site.channels, site.rd_channels, site.layout, site.style)
    slot = found.place.fill
    kind: Any = type(owner)
    own = found.place.inner if slot is None else takes_activation(kind, slot.name)
    act = _activation(owner) if own else None
    block = make_block(spec, config, act, found.gain, device, dtype)
    return block.train(owner.training)


def _activation(owner: nn.Module) -> type[nn.Module] | None:
    """The class of an owner's first activation."""
    for m in owner.modules():
        where = type(m).__module__
        if where.endswith((".activation", ".activations", ".activations_me")) and not list(m.children()):
            return type(m)
    return None
