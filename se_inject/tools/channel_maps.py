"""The maps that a block gates, for one picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..capture.snapshot import evaluating
from ..rescale.read_gates import gates
from ..surgery.state import injections_of
from ..undo import undone


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelMap:
    """A channel of the map that a block gets, (H, W), its number, and the gate that it is multiplied by."""

    channel: int
    gate: float
    map: torch.Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class StrongestChannels:
    """The channels of one site whose gates are the greatest and the least for a picture, each in that order."""

    path: str
    raised: tuple[ChannelMap, ...]
    lowered: tuple[ChannelMap, ...]


@torch.no_grad()
def strongest_channels(
    model: nn.Module, image: torch.Tensor, paths: Collection[str], count: int = 3,
) -> list[StrongestChannels]:  # fmt: skip
    """At some sites the channels whose gates are the greatest and the least for a picture. Changes nothing.

    Channels that are zero everywhere are left out: a gate does nothing to them.

    Args:
        model: An injected model.
        image: A picture (C, H, W).
        paths: Blocks that `gates` reads; those whose map has no height and width are left out.
        count: How many channels of each kind; of a narrow map fewer, so that none is shown twice.
    """
    device = next(p.device for p in model.parameters())
    layouts = {s.path: s.layout for injection in injections_of(model) for s in injection.sites if s.layout in ("NCHW", "NHWC")}
    maps: dict[str, torch.Tensor] = {}
    handles: list[RemovableHandle] = []

    def keep(path: str) -> RemovableHandle:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0][0].float().cpu()
            maps[path] = x if layouts[path] == "NCHW" else x.permute(2, 0, 1)

        return model.get_submodule(path).register_forward_pre_hook(hook)

    with evaluating(model), undone(lambda: [*map(RemovableHandle.remove, handles)]):
        handles.extend(map(keep, [p for p in paths if p in layouts]))
        model(image[None].to(device))
    found = []
    for s in gates(model, [image[None]]).sites:
        if s.path in maps:
            order = [c for c in s.mean.argsort(descending=True).tolist() if maps[s.path][c].any()]
            n = min(count, len(order) // 2)
            shown = [tuple(ChannelMap(c, float(s.mean[c]), maps[s.path][c]) for c in channels)
                     for channels in (order[:n], order[::-1][:n])]
            found.append(StrongestChannels(s.path, *shown))
    return found
