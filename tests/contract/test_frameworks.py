"""Injected models in the frameworks that people use timm's models with: each cell of docs/frameworks.md is a test.

`pytest` runs the quick columns, and of the others some families; `pytest -m contract` the rest. ``--overwrite`` writes the
page again, from the cells that were run and the old ones; it needs one process.
"""

from __future__ import annotations

import pathlib

import pytest

from se_inject.surgery.state import edited_owners, edits_of, injections_of

from ..support import compilers, training  # noqa: F401
from ..support.families import FAMILIES, identity
from ..support.frameworks import COLUMNS
from ..support.processes import part

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "frameworks.md"
HEAD = ("family", "blocks", *COLUMNS)
APART = ("worker process", "DDP", "FSDP2")  # these share two processes; the others what a model's export gave
QUICK = ("autocast", "bfloat16", "channels_last", "EMA", "checkpointing")  # on all families
# filled slots, an inserted block in a Sequential, and rewritten forwards, some of several branches
SOME = dict.fromkeys(("compile", "script", "trace"), ("resnet18", "vgg11_bn", "tiny_vit_5m_224"))
SOME |= dict.fromkeys(("export", "func"), ("resnet18", "vit_tiny_patch16_224"))
SOME |= dict.fromkeys((*APART, "compile, train"), ("resnet18",))


def cells() -> dict[str, dict[str, str]]:
    """The table of the page: by family, then by framework."""
    rows = [line.strip("| \n").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    return {row[0].strip("`"): dict(zip(HEAD, (c.strip() for c in row))) for row in rows}


def blocks(family) -> str:
    """How the blocks of a model were put in, and in which layouts they work."""
    model = identity(family)
    kinds = {
        "several branches" if any(k.startswith("_se_branch_") for k in vars(type(m))) else edits_of(m).kind
        for m in edited_owners(model)}
    layouts = {s.layout for i in injections_of(model) for s in i.sites}
    return f"{', '.join(sorted(kinds))}: {', '.join(sorted(layouts))}"


def page(table: dict[str, dict[str, str]]) -> str:
    rows = [" | ".join([f"`{f.name}`", *(table[f.name].get(h) or " " for h in HEAD[1:])]) for f in FAMILIES]
    return "\n".join([
        "# Frameworks",
        "",
        "Injected models under what people use timm's models with. Each cell is a test, and this page is written by",
        "",
        "```sh",
        "pytest -m '' tests/contract/test_frameworks.py --overwrite",
        "```",
        "",
        "A cell says `yes`; or `base:` and the error with which the model without blocks fails there, too. An empty one is not",
        "tested. The models have random weights and blocks that gate, except where the identity is the claim.",
        "",
        "| framework | what is compared |",
        "|---|---|",
        *(f"| {name} | {' '.join((column.function.__doc__ or '').split())} |" for name, column in COLUMNS.items()),
        "",
        "By family; under *blocks*, how the owners were rewritten, and the layouts of the gated tensors:",
        "",
        f"| {' | '.join(HEAD)} |",
        "|" + "---|" * len(HEAD),
        *(f"| {row} |" for row in rows),
        "",
        "The models are small: " + "; ".join(f.call() for f in FAMILIES) + ".",
        "",
    ])


@pytest.fixture(scope="module")
def found(request):
    """The cells that were run in this process."""
    new: dict[str, dict[str, str]] = {}
    yield new
    part()
    if request.config.getoption("--overwrite") and not hasattr(request.config, "workerinput"):
        old = cells() if PAGE.exists() else {}
        PAGE.write_text(page({
            f.name: {**old.get(f.name, {}), "blocks": blocks(f), **new.get(f.name, {})} for f in FAMILIES}))


def marks(column, family):
    group = pytest.mark.xdist_group("processes" if column in APART else family.name)
    return [group] if column in QUICK or family.name in SOME.get(column, ()) else [group, pytest.mark.contract]


@pytest.mark.parametrize("column, family", [
    pytest.param(c, f, id=f"{c}-{f.name}", marks=marks(c, f)) for f in FAMILIES for c in COLUMNS if COLUMNS[c].asks(f)])
def test_cell(column, family, found, request):
    cell = COLUMNS[column].outcome(family)
    found.setdefault(family.name, {})[column] = cell
    if not request.config.getoption("--overwrite"):
        assert cells()[family.name][column] == cell
    if cell != "yes":
        pytest.skip(cell)


def test_page(request):
    if request.config.getoption("--overwrite"):
        pytest.skip("it is being written")
    table = cells()
    assert PAGE.read_text() == page(table)
    for f in FAMILIES:
        assert table[f.name]["blocks"] == blocks(f)
        assert {c for c in COLUMNS if table[f.name][c]} == {c for c in COLUMNS if COLUMNS[c].asks(f)}


def test_all_kinds_of_rewriting_and_all_layouts_are_there():
    parts = [blocks(f).split(": ") for f in FAMILIES]
    assert {k for kinds, _ in parts for k in kinds.split(", ")} == {"fill", "insert", "rewrite", "several branches"}
    assert {k for _, layouts in parts for k in layouts.split(", ")} == {"NCHW", "NHWC", "NLC"}
