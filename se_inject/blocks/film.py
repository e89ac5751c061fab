"""Squeeze-and-excitation with a shift: each channel gets a scale and a bounded shift from one squeeze.

Source: Perez et al., FiLM: Visual Reasoning with a General Conditioning Layer, arXiv 1709.07871, section 2; Leela Chess Zero's
networks have squeeze-and-excitation with such a shift, which is unbounded there.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from .autograd import scale, squeeze
from .squeeze_excite import SqueezeExcite


class ScaleAndShift(SqueezeExcite):
    """Squeeze-and-excitation that shifts each channel, too: ``x * gate + u * tanh(0.4 * shift) / 4``.

    The layer `shift` reads the same hidden units as the layer of the gate. The unit `u` is the mean over channels of the
    absolute squeezed values, one number for each image, so that a shift is at most a quarter of the map's own means. With the
    factor 0.4 the shift takes steps of a tenth of what its layer does: unbounded, or bounded by the means themselves, it lets
    training diverge at learning rates that the gate alone survives.

    Args: as `SqueezeExcite`.

    Shape: as `layout` says, (N, C, H, W) for ``NCHW``. The output has the shape of the input.
    """

    def _register(self, reduce: nn.Module, act: nn.Module, expand: nn.Module, gate: nn.Module) -> None:
        super()._register(reduce, act, expand, gate)
        shift: Any = copy.deepcopy(expand)
        shift.reset_parameters()
        self.shift = shift
        self.channel_axis = self.layout.index("C")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        m = squeeze(x, self.dims)
        s = self.act(self.fc1(m))
        g: torch.Tensor = self.gate(self.fc2(s))
        if self.gain != 1.0:
            g = g * self.gain
        unit = m.abs().mean(self.channel_axis, keepdim=True)
        return scale(x, g, self.dims, torch.tanh(self.shift(s) * 0.4) * (unit * 0.25))
