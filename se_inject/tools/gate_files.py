"""A `GateReport` as a file: a page, or the figure for a paper."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from ..errors import ConfigError, SEInjectError
from ..rescale.gate_report import GateReport
from . import gate_plots
from .channel_maps import strongest_channels
from .gate_page import Picture, page
from .image_folder import ImageFolder

PAGE, FIGURES = ".html", (".png", ".svg")


def check(path: str, pictures: ImageFolder, classes: Sequence[str]) -> None:
    """Refuse a file that cannot be made, before the model runs.

    Raises:
        ConfigError: Its name has another suffix, or there is no such class.
        SEInjectError: matplotlib is not installed, or there is no such folder.
    """
    if os.path.splitext(path)[1] not in (PAGE, *FIGURES):
        raise ConfigError(f"{path!r}: expected an OUT that ends in {PAGE}, {' or '.join(FIGURES)}")
    if not Path(path).absolute().parent.is_dir():
        raise SEInjectError(f"{path!r}: there is no folder {str(Path(path).parent)!r}")
    gate_plots.matplotlib()
    gate_plots.lines(pictures.classes, classes)


def write(
    path: str, report: GateReport, model: nn.Module, pictures: ImageFolder, file: str, folder: str, classes: Sequence[str],
    max_variation: float,
) -> None:  # fmt: skip
    """Write a report to a file.

    Args:
        path: Its suffix says what is written.
        report: What `gates` found.
        model: The model.
        pictures: The images; the page shows the first one of a class that is drawn.
        file: The name of the model's file, for the page.
        folder: The name of the folder of the images, for the page.
        classes: The names of the classes to draw; without any, the first few.
        max_variation: The gates up to here are marked as those that `fold` takes.

    Raises:
        ConfigError: There is no such class.
        SEInjectError: The report has no gates for a figure, or the file cannot be written.
    """
    drawn = gate_plots.lines(report.classes, classes)
    try:
        if path.endswith(PAGE):
            text = page(
                report, Path(file).name, (getattr(model, "pretrained_cfg", None) or {}).get("architecture"),
                f"{Path(folder).resolve().name}/", drawn, max_variation, _picture(report, model, pictures, drawn))
            Path(path).write_text(text, encoding="utf-8")
        elif not report.sites:
            raise SEInjectError(f"{path!r}: there are no gates to draw:\n{report}")
        else:
            gate_plots.write(report, drawn, max_variation, path)
    except OSError as error:
        raise SEInjectError(f"{path!r} cannot be written: {error}") from error


def _picture(report: GateReport, model: nn.Module, pictures: ImageFolder, drawn: Sequence[gate_plots.Line]) -> Picture:
    """The first picture of the first class that is drawn."""
    label = drawn[0].name if drawn else None
    image = pictures.first(label)
    sites = [s.path for s in gate_plots.early_middle_last(report)]
    return Picture(pictures.as_seen(image), label, strongest_channels(model, image, sites))
