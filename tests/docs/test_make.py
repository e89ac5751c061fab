"""`docs/make.py` replaces the tables of a page and nothing else, and the committed pages are as it writes them."""

import pathlib
import re
import runpy
import shlex
import shutil
import types

import click
import pytest
import timm

from se_inject import cli
from se_inject.tools import zoo_table

from ..support.processes import fresh, script

pytestmark = pytest.mark.xdist_group("processes")
DOCS = pathlib.Path(__file__).parents[2] / "docs"
make = types.SimpleNamespace(**runpy.run_path(str(DOCS / "make.py")))
A_PAGE = """before

<!-- one: begin -->

```sh
se-inject bench test_resnet --no-native
```

old

<!-- one: end -->
between
<!-- two: begin -->

```sh
se-inject bench test_vit --vs 'a b=1'
```
<!-- two: end -->
after
"""


def call(folder, *args, code=0):
    """Run a copy of the script, which writes the pages of its own folder."""
    done = fresh(script(shutil.copy(DOCS / "make.py", folder), folder), *args)
    assert done.returncode == code, done.stderr
    return done


def test_a_page_keeps_what_stands_around_its_tables(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(A_PAGE)
    asked = []
    assert make.remake_tables(page, lambda words: asked.append(words) or r"| \1 new |", ["two"]) == ["two"]
    assert asked == [["bench", "test_vit", "--vs", "a b=1"]]
    assert page.read_text() == A_PAGE.replace("```\n<!-- two: end", "```\n\n| \\1 new |\n\n<!-- two: end")
    assert make.remake_tables(page, lambda words: "new") == ["one", "two"]
    assert page.read_text().count("new") == 2
    assert "old" not in page.read_text()
    with pytest.raises(SystemExit, match="has no table three; its tables are one, two"):
        make.remake_tables(page, lambda words: "new", ["three"])


def measured(ratio, inject):
    """The output of `se-inject bench`, with one ratio."""
    header = f"| model | {'inject / create_model' if inject else 'batch | variant | over base | over base, optimized'} |"
    row = f"| a | {ratio} (0 to 1) |"
    rows = row if inject else f"| a | 1 | base | | |\n| a | 1 | other, optimized | +9.0% | {ratio} (x) |"
    return f"A machine.\n\n{header}\n| --- |\n{rows}"


def test_a_page_has_the_range_of_all_runs(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(A_PAGE + "<!-- runs of one two: begin --><!-- runs of one two: end -->\nend")
    runs = (False, "+99.0%", "9.00"), (False, "-1.0%", "0.90"), (True, "+10.0%", "1.10"), (True, "+2.0%", "0.90")
    for again, one, two in runs:
        outputs = iter([measured(one, False), measured(two, True)])
        make.remake_tables(page, lambda words, outputs=outputs: next(outputs), again=again)
    text = page.read_text()
    assert text.partition("<!-- runs of one two: begin -->")[2] == """

| model | batch | variant | one, 3 runs | two, 3 runs |
| --- | ---: | --- | ---: | ---: |
| a | 1 | other, optimized | -1.0% to +10.0% |  |
| a |  |  |  | 0.90 to 1.10 |

<!-- runs of one two: end -->
end"""
    make.remake_tables(page, lambda words: measured("1.20", True), ["two"])
    assert "one, 3 runs | two, 1 run |" in page.read_text()
    assert "| 1.20 |" in page.read_text()


def test_a_range_needs_its_tables(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(A_PAGE + "<!-- runs of two: begin -->as it was<!-- runs of two: end -->")
    make.remake_tables(page, lambda words: "no table")
    assert "as it was" in page.read_text()
    page.write_text(A_PAGE + "<!-- runs of one three: begin --><!-- runs of one three: end -->")
    with pytest.raises(SystemExit, match="has a range of three; its tables are one, two"):
        make.remake_tables(page, lambda words: "new")


def test_the_ranges_of_the_page_are_those_of_its_runs():
    text = (DOCS / "cost.md").read_text()
    runs = make.read_runs(DOCS / "cost-runs.csv")
    assert make.with_ranges(text, runs) == text
    tables = {m["name"]: make.ratios(m[0]) for m in make.TABLE.finditer(text)}
    assert tables == {name: runs[name][-1] for name in tables}
    for m in make.RANGES.finditer(text):
        assert all(len(runs[name]) >= 2 for name in m["names"].split())


@pytest.mark.contract
def test_a_table_is_the_output_of_its_command(tmp_path):
    page = tmp_path / "cost.md"
    page.write_text(A_PAGE.replace("test_resnet --no-native", "test_resnet --measure surgery --device meta --rounds 1"))
    assert call(tmp_path, "cost", "one").stdout == "one\n"
    text = page.read_text()
    assert "| model | parameters | nodes |" in text and "| test_resnet | " in text and "old" not in text


def test_a_command_that_fails_leaves_its_table(tmp_path):
    page = tmp_path / "cost.md"
    page.write_text(A_PAGE.replace("test_vit --vs 'a b=1'", "test_vit --batch none"))
    before = page.read_text()
    err = call(tmp_path, "cost", "two", code=1).stderr
    assert "se-inject bench test_vit --batch none failed" in err
    assert "'none' is not a valid integer" in err
    assert page.read_text() == before


def test_the_commands_of_the_page_can_be_given():
    text = (DOCS / "cost.md").read_text()
    commands = [m["command"] for m in make.TABLE.finditer(text)]
    assert len(commands) == len(re.findall(r"<!-- [\w-]+: begin -->", text)) >= 7
    shown = re.findall(r"^se-inject bench .*$", text, re.MULTILINE)
    assert set(commands) <= set(shown)
    bench_command = cli.main.commands["bench"]
    for command in shown:
        context = bench_command.make_context("bench", shlex.split(command)[2:])
        assert isinstance(context, click.Context)
        assert all(timm.is_model(name) for name in context.params["names"])
        assert all(timm.is_model(name) for name, _ in context.params["others"])


def test_the_committed_zoo_is_as_the_script_writes_it(tmp_path):
    call(tmp_path, "zoo", DOCS / "zoo.csv")
    for name in ("zoo.csv", "zoo.md"):
        assert (tmp_path / name).read_text() == (DOCS / name).read_text()


def test_the_page_of_the_zoo_has_one_placement(tmp_path):
    rows = [r for r in zoo_table.read(DOCS / "zoo.csv") if r.family == "resnet"]
    other = zoo_table.Row("resnet18", "resnet", "inner", "injected", params=1)
    zoo_table.Table(tmp_path / "some.csv", [*rows, other])
    call(tmp_path, "zoo", tmp_path / "some.csv")
    assert f"{len(rows)} models: " in (tmp_path / "zoo.md").read_text()
    zoo_table.Table(tmp_path / "some.csv", [other])
    assert "no rows with placement auto" in call(tmp_path, "zoo", tmp_path / "some.csv", code=1).stderr


def test_the_worked_example_is_what_the_package_prints():
    page = (DOCS / "how-it-works.md").read_text()
    assert make.with_steps(page, make.worked_example()) == page
