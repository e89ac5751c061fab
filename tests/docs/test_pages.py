"""The pages in docs/ show what the package prints."""

import pathlib
import re
import shlex

import pytest

from ..cli.test_cli import call
from ..support.versions import needs_newest

DOCS = pathlib.Path(__file__).parents[2] / "docs"
SHOWN = re.compile(r"```\n(\$ (se-inject [^\n]+)\n.*?)```", re.DOTALL)


def shown(text: str) -> str:
    """The page with the output of each command that it shows."""
    def run(match: re.Match[str]) -> str:
        out, _ = call(*shlex.split(match[2])[1:])
        return f"```\n$ {match[2]}\n{out}```"

    return SHOWN.sub(run, text)


@needs_newest
@pytest.mark.parametrize("page", [p.name for p in sorted(DOCS.glob("*.md")) if SHOWN.search(p.read_text())])
def test_a_page_shows_what_is_printed(page, request):
    path = DOCS / page
    text = path.read_text()
    new = shown(text)
    if request.config.getoption("--overwrite"):
        path.write_text(new)
    assert new == text


def test_there_is_such_a_page():
    assert len(SHOWN.findall((DOCS / "placement.md").read_text())) >= 12
