"""The recipe in a file's header: what rebuilds an injected model, as one JSON string.

A recipe names options and a timm model. Nothing in it is ever imported or run.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from torch import nn

from .config import SEConfig
from .errors import ConfigError, WeightsError
from .registry import base_name
from .surgery import Injection

KEY = "se_inject"
VERSION = 1
_FIELDS = {
    "version": int, "architecture": (str, type(None)), "model_args": dict, "configs": list, "sites": list,
    "content": str,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a file says of the model whose weights it holds.

    Attributes:
        architecture: The timm name of the base, or None for a model that is not timm's.
        model_args: The arguments of `timm.create_model` that differ from its defaults.
        configs: The options of the injections, in order.
        sites: Paths of the blocks.
        content: ``full``, or ``se`` for the blocks alone.
    """

    architecture: str | None
    model_args: dict[str, Any]
    configs: tuple[SEConfig, ...]
    sites: tuple[str, ...]
    content: str

    @classmethod
    def of(cls, model: nn.Module, injections: tuple[Injection, ...], content: str) -> Recipe:
        """The recipe of an injected model.

        Raises:
            WeightsError: An argument that timm was given is no JSON value.
        """
        cfg: Any = getattr(model, "pretrained_cfg", None)
        architecture = cfg.get("architecture") if hasattr(cfg, "get") else None
        args = {k: v for k, v in getattr(model, "_model_args", {}).items() if not k.startswith("se_")}
        for name in ("num_classes", "in_chans"):  # a head may have been reset after creation
            value = getattr(model, name, None)
            if isinstance(value, int) and (name in args or value != _default(cfg, name)):
                args[name] = value
        for key, value in args.items():
            try:
                json.dumps(value)
            except TypeError:
                raise WeightsError(
                    f"the model was created with {key}={value!r}, which cannot be written to a file; "
                    "create it with a plain value, or save the object with torch.save(model, path)") from None
        configs: list[SEConfig] = []
        paths: list[str] = []
        for injection in injections:
            chosen = tuple(s.path for s in injection.sites)
            config = injection.config
            if config.filter_fn is not None:  # the sites that it chose, by name
                config = dataclasses.replace(config, filter_fn=None, include=chosen, exclude=None)
            configs.append(config)
            paths += chosen
        return cls(base_name(str(architecture)) if architecture else None, args, tuple(configs), tuple(paths), content)

    def to_json(self) -> str:
        """The recipe as the string that stands in a file's header."""
        return json.dumps({
            "version": VERSION, "architecture": self.architecture, "model_args": self.model_args,
            "configs": [c.to_dict() for c in self.configs], "sites": list(self.sites), "content": self.content,
        }, sort_keys=True)  # fmt: skip

    @classmethod
    def from_json(cls, text: str, source: object) -> Recipe:
        """Parse and check the recipe of the file `source`.

        Raises:
            WeightsError: It is no recipe of a known version.
        """
        try:
            said = json.loads(text)
        except ValueError as error:
            raise WeightsError(f"{source}: its recipe is no JSON ({error}); save the model again") from error
        version = said.get("version") if isinstance(said, dict) else None
        if version != VERSION:
            raise WeightsError(
                f"{source}: its recipe is of version {version!r}, and this se_inject reads {VERSION}; "
                "install the se_inject that wrote the file")
        for key, kind in _FIELDS.items():
            if key not in said or not isinstance(said[key], kind):  # type: ignore[arg-type]
                raise WeightsError(f"{source}: its recipe has no valid {key!r} ({said.get(key)!r}); save the model again")
        unknown = sorted(said.keys() - _FIELDS.keys())
        if unknown or said["content"] not in ("full", "se"):
            raise WeightsError(
                f"{source}: its recipe says {unknown or said['content']}, which this se_inject does not know")
        try:
            configs = tuple(SEConfig.of(dict(c)) for c in said["configs"])
        except (ConfigError, TypeError, ValueError) as error:
            raise WeightsError(f"{source}: its recipe is not valid: {error}") from error
        return cls(said["architecture"], said["model_args"], configs, tuple(map(str, said["sites"])), said["content"])


def _default(cfg: Any, name: str) -> int | None:
    """What timm makes of a model when it is not told."""
    if name == "in_chans":
        size = cfg.get("input_size") if hasattr(cfg, "get") else None
        return int(size[0]) if size else 3
    return cfg.get("num_classes") if hasattr(cfg, "get") else None
