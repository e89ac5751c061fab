"""The docstrings of the public names: their examples run as they stand, and their sections name every argument."""

from __future__ import annotations

import builtins
import dataclasses
import doctest
import inspect
import re
import sys
from collections.abc import Callable

import pytest

import se_inject
from se_inject import errors
from se_inject.blocks import catalogue

PUBLIC = {getattr(se_inject, name).__name__: getattr(se_inject, name) for name in se_inject.__all__ if name != "__version__"}
MODULES = sorted({value.__module__ for value in PUBLIC.values()})
RAISE_NOTHING = {"block_paths", "input_sizes"}  # they answer for every module
public = pytest.mark.parametrize("name", PUBLIC)


@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module, tmp_path, monkeypatch):
    """Without the names of their module, as a user types them; they leave no file and no block."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(catalogue, "_rows", dict(catalogue._rows))
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in doctest.DocTestFinder().find(sys.modules[module], globs={}):
        runner.run(test, out=said.append)
    assert not runner.failures, "".join(said)
    assert not list(tmp_path.iterdir())


@public
def test_there_is_an_example(name):
    (test, *_) = doctest.DocTestFinder(recurse=False).find(PUBLIC[name], globs={})
    assert any(not example.options.get(doctest.SKIP) for example in test.examples)


def sections(text: str) -> dict[str, str]:
    """The text of each section, by its title."""
    parts = re.split(r"^(Args|Attributes|Returns|Raises|Shape|Source|Example):", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


def named(section: str) -> list[str]:
    """The names that a section explains, in order: one at the start of each entry."""
    return re.findall(r"^    (\**\w+):", section, re.MULTILINE)


def parameters(value: Callable[..., object]) -> list[str]:
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return [stars.get(p.kind, "") + p.name for p in inspect.signature(value).parameters.values()]


@public
def test_sections_name_all_arguments_results_and_errors(name):
    value = PUBLIC[name]
    found = sections(inspect.getdoc(value) or "")
    if inspect.isfunction(value):
        assert named(found.get("Args", "")) == parameters(value)
        assert ("Returns" in found) == (inspect.signature(value).return_annotation != "None")
        assert ("Raises" in found) == (name not in RAISE_NOTHING)
    else:
        fields = [f.name for f in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
        explained = named(found.get("Args", found.get("Attributes", "")))
        assert explained and explained == (fields or explained)
        assert "Raises" in found or "__post_init__" not in vars(value)
    known = {**vars(builtins), **vars(errors)}
    assert all(issubclass(known[error], Exception) for error in named(found.get("Raises", "")))
