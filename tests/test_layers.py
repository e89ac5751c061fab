"""What `lint-imports` (pyproject.toml) cannot see: a part of torch, and single names."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import grimp

import se_inject

PACKAGE = Path(se_inject.__file__).parent


def imported(path: Path) -> Iterator[tuple[str, str]]:
    """The module and the name of each import in a file, also in its functions; the name is empty for `import a.b`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield "." * node.level + (node.module or ""), alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, ""


def torch_fx_names(path: Path) -> list[str]:
    """Where a file imports torch.fx, or reads it from torch."""
    imports = [f"{module}.{name}" for module, name in imported(path)]
    reads = [ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
    return [n for n in (*imports, *reads) if f"{n}.".startswith("torch.fx.")]


def test_blocks_import_no_fx():
    found = {str(path): torch_fx_names(path) for path in (PACKAGE / "blocks").rglob("*.py")}
    assert len(found) > 3 and not any(found.values()), found


def test_no_private_name_of_another_file_is_imported():
    private = [
        f"{path.relative_to(PACKAGE)}: {module} {name}" for path in PACKAGE.rglob("*.py") for module, name in imported(path)
        if module.startswith((".", "se_inject")) and any(p.startswith("_") for p in (*module.lstrip(".").split("."), name))]
    assert not private, private


def private_names(path: Path) -> list[str]:
    """The names with an underscore that a file imports from torch, timm or safetensors, or reads from the module."""
    public = ("torch.utils._pytree", "torch.utils._python_dispatch")  # see private.py
    imports = [f"{module}.{name}".rstrip(".") for module, name in imported(path)]
    reads = [ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
    return [n for n in (*imports, *reads) if n.split(".")[0] in ("torch", "nn", "fx", "timm", "safetensors")
            and n.replace(".", "").isidentifier() and not n.startswith(public)
            and any(p.startswith("_") and not p.startswith("__") for p in n.split("."))]


def test_private_names_of_torch_and_timm_are_in_one_file():
    found = {path.relative_to(PACKAGE).as_posix(): private_names(path) for path in PACKAGE.rglob("*.py")}
    assert found.pop("private.py")
    assert not any(found.values()), {file: names for file, names in found.items() if names}


def test_at_most_15_files_stand_on_each_other():
    graph = grimp.build_graph("se_inject")

    @functools.cache
    def depth(module: str) -> int:
        return 1 + max(map(depth, graph.find_modules_directly_imported_by(module)), default=0)

    deepest = max(graph.modules, key=depth)
    assert 5 < depth(deepest) <= 15, f"{deepest} stands on {depth(deepest) - 1} levels"
