"""TODO"""

from __future__ import annotations

import dataclasses

KINDS = {
    "residual": "residual", "inverted_residual": "inverted residual", "aggregation": "aggregation", "conv": "conv"}


@dataclasses.dataclass(frozen=True)
class Site:
    """One place for a block.

    Attributes:
        path: Dotted name of the block, `owner` and `slot`; what `include` and `exclude` match.
        owner: Dotted name of the module whose forward is rewritten; empty for the model itself.
        slot: Name of the block in its owner.
        kind: ``residual``, ``inverted_residual``, ``aggregation`` or ``conv``; ``unknown`` where a forward could not be traced.
        channels: Gated channels.
        layout: ``NCHW``, ``NHWC`` or ``NLC``.
        size: Positions, (H, W) or (L,), at the planned input size.
        stage: Number as in timm's ``out_indices``; the stem is 0.
        style: ``se`` (keys fc1, fc2), ``efficientnet`` (keys conv_reduce, conv_expand), or the name of another block.
        rd_channels: Squeeze width; 0 where it is left to the block.
        params: Parameters added.
        macs: Multiply-adds added for one image: the layers of the block and the scale.
        reason: Why the site is skipped; None when it gets a block.
        replaces: Names of the base's tensors that go with the attention that the block replaces.
        drawing: The unit and its block as text; see `Plan.diagram`.
    """

    path: str
    owner: str
    slot: str
    kind: str
    channels: int
    layout: str
    size: tuple[int, ...]
    stage: int
    style: str
    rd_channels: int
    params: int
    macs: int
    reason: str | None = None
    replaces: tuple[str, ...] = ()
    drawing: str = dataclasses.field(default="", repr=False, compare=False)
