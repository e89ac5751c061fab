"""What pyproject.toml asks for: enough for the tests, and no other torch than one that is installed."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def asked_for(extra: str) -> set[str]:
    """The names of the distributions that an install of this package with an extra asks for, and of those that they need."""
    found: set[str] = set()
    todo = [*map(Requirement, PROJECT["dependencies"]), Requirement(f"se-inject[{extra}]")]
    while todo:
        asked = todo.pop()
        if asked.name == "se-inject":
            todo += [Requirement(text) for name in asked.extras for text in PROJECT["optional-dependencies"][name]]
        elif (name := canonicalize_name(asked.name)) not in found:
            found.add(name)
            try:
                needed = map(Requirement, importlib.metadata.requires(name) or ())
            except importlib.metadata.PackageNotFoundError:
                continue
            todo += [r for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def test_the_extra_for_tests_has_what_they_import():
    homes = importlib.metadata.packages_distributions()
    asked, own = asked_for("test"), {"se_inject", "tests", "docs", "examples", *sys.stdlib_module_names}
    lacks = {}
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else (
                [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else [])
            for name in {n.partition(".")[0] for n in names} - own:
                if asked.isdisjoint(map(canonicalize_name, homes.get(name, [name]))):
                    lacks[name] = path.name
    assert not lacks and {"torch", "numpy", "pytest"} <= asked


@pytest.mark.parametrize("name", ["torch", "timm"])
def test_every_supported_version_stays_when_this_is_installed(name):
    low, high = re.search(rf"{name}\s+([\d.]+\d)\s+to\s+([\d.]+\d)", (ROOT / "README.md").read_text()).groups()
    bounds = [r.specifier for r in map(Requirement, PROJECT["dependencies"]) if r.name == name]
    between = ["2.9.1", "2.12.1"] if name == "torch" else ["1.0.20"]
    assert len(bounds) == 1 and all(v in bounds[0] for v in (low, *between, high)) and str(bounds[0]) == f">={low}"
