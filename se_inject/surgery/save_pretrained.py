"""Folders of Hugging Face: `save_pretrained` of an injected model writes what was injected to ``config.json``."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from ..undo import undone
from .state import injections_of

KEY = "se_inject"  # of the recipe in ``config.json`` and in the header of a file
VERSION = 1
_logger = logging.getLogger("se_inject")


def save_pretrained(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The `save_pretrained` of the model's class, with the injections in its config while it writes.

    Models that were made of one config share it, so that it has them no longer than that.
    """
    config = getattr(model, "config", None)
    method: Any = type(model).save_pretrained  # type: ignore[attr-defined]
    if not hasattr(config, "to_json_string"):
        _logger.warning(
            "%s.save_pretrained writes no config that holds the options of the blocks: write them with "
            "se_inject.save(model, path)", type(model).__name__)
        return method(model, *args, **kwargs)
    own = vars(config)
    before = {KEY: own[KEY]} if KEY in own else {}

    def put_back() -> None:
        own.pop(KEY, None)
        own.update(before)

    with undone(put_back):
        own[KEY] = _described(model)
        return method(model, *args, **kwargs)


def _described(model: nn.Module) -> dict[str, Any]:
    injections = injections_of(model)
    return {
        "version": VERSION, "configs": [i.written().to_dict() for i in injections],
        "input_sizes": [i.written_inputs() for i in injections],
        "sites": [s.path for i in injections for s in i.sites]}
