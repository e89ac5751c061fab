"""One place in a model for a block, as plain data."""

from __future__ import annotations

import dataclasses

# Keys are the values of `Site.kind`; values are the words of a text for a reader.
KINDS = {
    "residual": "residual", "inverted_residual": "inverted residual", "aggregation": "aggregation", "conv": "conv"}


@dataclasses.dataclass(frozen=True)
class Site:
    """One place in a model for a block: filled, or skipped with a reason.

    `Plan.sites` and `Plan.skipped` hold the sites of a model, and `SEConfig.filter_fn` gets one site at a time.

    Args:
        path: Dotted name of the block: `owner` and `slot`. The globs of `include` and `exclude` match it.
        owner: Dotted name of the module whose forward calls the block; empty for the model itself.
        slot: Name of the block in its owner.
        kind: ``residual``, ``inverted_residual``, ``aggregation`` or ``conv``; ``unknown`` if the forward of the owner
            could not be traced.
        channels: Number of gated channels.
        layout: ``NCHW``, ``NHWC`` or ``NLC``; ``NCL``, ``NCDHW`` or ``NDHWC`` in networks for signals and volumes.
        size: Positions, (H, W), (L,) or (D, H, W), at the planned input size.
        stage: Number of the stage, as in timm's ``out_indices``; the stem is 0.
        style: ``se`` (keys ``fc1``, ``fc2``), ``efficientnet`` (keys ``conv_reduce``, ``conv_expand``), or the name of
            another block.
        rd_channels: Squeeze width; 0 if the block chooses it.
        params: Number of added parameters.
        macs: Number of added multiply-adds for one image: the layers of the block and the scale.
        reason: Why the site is skipped; None if it gets a block.
        replaces: Names of the base tensors that go with a replaced attention module.
        drawing: The unit and its block as text; see `Plan.diagram`.

    Example:
        >>> import se_inject
        >>> site = se_inject.plan("test_resnet").sites[0]
        >>> site.path, site.kind, site.layout, site.channels, site.stage
        ('layer1.0.se', 'residual', 'NCHW', 32, 1)
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
