"""Blocks replaced by constant factors: parameters scaled, and blocks taken out."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from torch import nn

from ..surgery.codegen import generate
from ..surgery.edits import apply_edits, undo_edits
from ..surgery.state import base_class, edits_of, slots_of
from .gates import GatedBlock


def replace_blocks(model: nn.Module, blocks: Collection[GatedBlock]) -> None:
    """Take blocks out of a model, in place, and let its parameters take in their mean gates and shifts."""
    parameters = dict(model.named_parameters())
    going = {b.site.path for b in blocks}
    for path, m in list(model.named_modules()):
        prefix = f"{path}." if path else ""
        _take_out(m, {slot for slot in slots_of(m) if prefix + slot in going})
    for b in blocks:
        for s in b.scalings:
            p = parameters[s.key]
            p.copy_(s.scale(p, b.factors))
        if b.bias is not None:
            p = parameters[b.bias]
            p.copy_(p.double() + b.terms.to(p.device))


def _take_out(owner: nn.Module, slots: set[str]) -> None:
    """Take some of an owner's blocks out, in place; with the last one, all that was done to the owner."""
    if not slots:
        return
    edits = edits_of(owner)
    assert edits is not None
    left = tuple(e for e in edits.edits if e.slot not in slots)
    blocks = {e.slot: owner.get_submodule(e.slot) for e in left}
    undo_edits(owner)
    if left:
        new = dataclasses.replace(edits, edits=left)
        code = generate(owner, new)
        assert type(owner) is base_class(owner)
        apply_edits(owner, new, code, blocks)
