"""The recipe in the header of a file: what rebuilds an injected model, as one JSON string.

A recipe names options and a timm model. Nothing in it is ever imported or run.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from ..capture.example import Inputs, from_json, to_json
from ..config import SEConfig
from ..errors import ConfigError, WeightsError
from ..surgery.save_pretrained import KEY as KEY  # the files of this folder take it from here
from ..surgery.save_pretrained import VERSION
from ..surgery.state import Injection
from ..timm_names import model_args, tagged_name

PARTS = {"se": "blocks", "head": "head", "norms": "norms", "stats": "statistics"}  # of a model, which a file may hold alone
FULL = "full"  # the content of a file that holds all parts and the base
_FIELDS = {
    "version": int, "architecture": (str, type(None)), "model_args": dict, "configs": list, "input_sizes": list,
    "sites": list, "content": str,
}  # fmt: skip
_NOT_OF_A_MODEL = {  # arguments of timm.create_model that name files, or say how to load, place or wrap the model
    "checkpoint_path", "cache_dir", "device", "dtype", "scriptable", "exportable", "no_jit", "features_only", "feature_cls",
    "out_indices"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a file says of the model whose weights it holds.

    Attributes:
        architecture: The timm name of the base, with its tag if that is not the name's own; or None for a model that is not
            timm's.
        model_args: The arguments of `timm.create_model` that differ from its defaults.
        configs: The options of the injections, in order.
        inputs: What each injection was run on, where it was asked for: `input_size` or `example_inputs`.
        sites: Paths of the blocks.
        content: ``full``, or the parts that the file holds, such as ``se`` or ``se+head+stats``.
    """

    architecture: str | None
    model_args: dict[str, Any]
    configs: tuple[SEConfig, ...]
    inputs: tuple[Inputs, ...]
    sites: tuple[str, ...]
    content: str

    @classmethod
    def of(cls, model: nn.Module, injections: tuple[Injection, ...], content: str) -> Recipe:
        """The recipe of an injected model.

        Raises:
            WeightsError: An argument of `timm.create_model` is no JSON value.
        """
        architecture, args = _created_by(model)
        return cls(
            architecture, args, tuple(i.written() for i in injections),
            tuple(i.inputs for i in injections), tuple(s.path for i in injections for s in i.sites), content)

    def to_json(self) -> str:
        """The recipe as a string for the header of a file."""
        return json.dumps({
            "version": VERSION, "architecture": self.architecture, "model_args": self.model_args,
            "configs": [c.to_dict() for c in self.configs], "input_sizes": list(map(to_json, self.inputs)),
            "sites": list(self.sites), "content": self.content,
        }, sort_keys=True)  # fmt: skip

    @classmethod
    def from_json(cls, text: str, source: object) -> Recipe:
        """Parse and check the recipe of the file `source`.

        Raises:
            WeightsError: It is no recipe of a known version.
        """
        try:
            said = parsed(text)
        except ValueError as error:
            raise WeightsError(f"{source}: its recipe is no JSON ({error}); save the model again") from error
        version = said.get("version") if isinstance(said, dict) else None
        if version != VERSION:
            raise WeightsError(
                f"{source}: its recipe is of version {version!r}, and this se_inject reads version {VERSION}: "
                "install the se_inject that wrote the file")
        for key, kind in _FIELDS.items():
            if key not in said or not isinstance(said[key], kind):  # type: ignore[arg-type]
                raise WeightsError(f"{source}: its recipe has no valid {key!r} ({said.get(key)!r}); save the model again")
        unknown = sorted(said.keys() - _FIELDS.keys())
        if unknown or not _is_content(said["content"]):
            raise WeightsError(
                f"{source}: its recipe says {unknown or said['content']!r}, which this se_inject does not know: "
                "install the se_inject that wrote the file")
        try:
            configs = tuple(SEConfig.of(dict(c)) for c in said["configs"])
            inputs = tuple(map(from_json, said["input_sizes"]))
        except (ConfigError, TypeError, ValueError, OverflowError) as error:
            raise WeightsError(f"{source}: its recipe is not valid ({error}); save the model again") from error
        if not configs or len(configs) != len(inputs):
            raise WeightsError(
                f"{source}: its recipe has {len(configs)} injections with {len(inputs)} input sizes; save the model again")
        return cls(
            said["architecture"], checked_args(said["model_args"], source), configs, inputs,
            tuple(map(str, said["sites"])), said["content"])

    @classmethod
    def from_config(cls, said: Any, source: object) -> Recipe:
        """Parse and check what `save_pretrained` of an injected model has written to the config `source`.

        Raises:
            WeightsError: It is no recipe of a known version.
        """
        whole: dict[str, Any] = {"architecture": None, "model_args": {}, "content": FULL}
        return cls.from_json(json.dumps({**said, **whole} if isinstance(said, dict) else said), source)


def content_of(parts: Collection[str]) -> str:
    """The content of a file with these parts; with none, it is the whole model."""
    return "+".join(name for name in PARTS if name in parts) or FULL


def _is_content(text: str) -> bool:
    return text == content_of([] if text == FULL else text.split("+"))


def parts_in_words(content: str) -> str:
    """The parts that a file holds, such as ``blocks and the head``."""
    *first, last = (PARTS[name] for name in content.split("+"))
    return f"{', the '.join(first)} and the {last}" if first else last


def parsed(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: `text` is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _created_by(model: nn.Module) -> tuple[str | None, dict[str, Any]]:
    """The timm name and the arguments that create a model; (None, {}) if they do not, as for a feature wrapper.

    Raises:
        WeightsError: An argument is no JSON value.
    """
    architecture = tagged_name(model)
    args = {key: value for key, value in model_args(model).items() if not key.startswith("pretrained")}
    if architecture is None or _NOT_OF_A_MODEL & args.keys():
        return None, {}
    for key, value in args.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            raise WeightsError(
                f"the model was created with {key}={value!r}, which cannot be written to a file: "
                "create it with a plain value, or save the object with torch.save(model, path)") from None
    return architecture, args


def description(model: nn.Module) -> dict[str, str]:
    """Name and arguments of a plain timm model, as strings for the header of a file with its weights.

    Raises:
        WeightsError: An argument of `timm.create_model` is no JSON value.
    """
    architecture, args = _created_by(model)
    return {"architecture": architecture, "model_args": json.dumps(args, sort_keys=True)} if architecture else {}


def described_args(metadata: Mapping[str, str], source: object) -> dict[str, Any]:
    """The arguments in a header that `description` wrote; none in other headers.

    Raises:
        WeightsError: They are not valid.
    """
    try:
        args = parsed(metadata.get("model_args", "{}"))
    except ValueError as error:
        raise WeightsError(f"{source}: its model_args are no JSON ({error}); write the file again") from error
    if not isinstance(args, dict):
        raise WeightsError(f"{source}: its model_args are {args!r}, which is not a dict; write the file again")
    return checked_args(args, source)


def checked_args(args: Mapping[str, Any], source: object) -> dict[str, Any]:
    """Check the arguments of `timm.create_model` that the file `source` names, and return them.

    Raises:
        WeightsError: One of them does not describe the model, such as a path to other weights.
    """
    wrong = sorted(key for key in map(str, args) if key in _NOT_OF_A_MODEL or key.startswith("pretrained"))
    if wrong:
        raise WeightsError(
            f"{source}: it asks for {wrong[0]}={args[wrong[0]]!r}, which says how to load a model, not what it is: "
            "remove it from the file, and give it where you load the model")
    return {str(key): value for key, value in args.items()}
