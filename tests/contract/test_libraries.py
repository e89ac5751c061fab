"""The libraries that most people use: their scripts of docs/libraries.md run. `python -m tests.libraries` runs all."""

from __future__ import annotations

import pytest

from .. import libraries
from ..libraries import PAGE, Row, last_line, requirement_files, run, table_of, with_rows

MOST_USED = ("transformers_vit", "transformers_trainer", "torchvision_segmentation", "smp_unet", "onnxruntime_session")


@pytest.mark.contract
@pytest.mark.xdist_group("libraries")
@pytest.mark.parametrize("name", MOST_USED)
def test_script(name):
    checks, error = run(libraries.SCRIPTS / f"{name}.py")
    assert not error
    assert checks.pop("blocks") > 0 and all(value is True for value in checks.values())


def test_every_script_has_a_library_and_a_row():
    scripts = sorted(p.name for p in libraries.SCRIPTS.glob("*.py"))
    assert sorted(p.name for found in requirement_files().values() for p in found) == scripts
    assert sorted(table_of(PAGE.read_text())) == scripts
    assert with_rows(PAGE.read_text(), []) == PAGE.read_text()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two scripts of a library, one of which fails; and a page without rows."""
    (tmp_path / "pytest.txt").write_text("pytest>=8\n")
    (tmp_path / "pytest_good.py").write_text('print("words")\nprint(\'{"identity": true, "blocks": 4, "fuse": true}\')')
    (tmp_path / "pytest_bad.py").write_text("one = 1\nassert one == 2")
    (tmp_path / "page.md").write_text("# Page\n\n<!-- table: begin -->\n\n<!-- table: end -->\n")
    monkeypatch.setattr(libraries, "SCRIPTS", tmp_path)
    monkeypatch.setattr(libraries, "PAGE", tmp_path / "page.md")
    return tmp_path


def test_a_failure_is_in_the_table_and_in_the_exit_code(folder, capsys):
    assert libraries.main(["pytest", "--here"]) == 1
    page = (folder / "page.md").read_text()
    bad, good = table_of(page).values()
    assert bad.endswith("|  |  |  |  | fails: AssertionError: assert one == 2 |")
    assert good.endswith("| yes | 4 |  |  | fuse |") and f"| {pytest.__version__} |" in good
    (folder / "pytest_bad.py").unlink()
    assert libraries.main(["--here"]) == 0
    assert list(table_of((folder / "page.md").read_text())) == ["pytest_good.py"]


def test_an_unknown_name_is_refused(folder, capsys):
    with pytest.raises(SystemExit):
        libraries.main(["nothing"])
    assert "there are pytest" in capsys.readouterr().err


def test_a_false_check_is_a_failure():
    row = Row("library", "library_x.py", checks={"identity": False, "blocks": 3})
    assert row.failed and row.cells()[4:6] == ["no", "3"]


def test_an_error_is_told_from_what_is_printed_after_it():
    assert last_line("Traceback\n  x\n    ^^^\na.b.ValueError: one\n\r 0%| | 0/2 [00:00<?, ?it/s]") == "a.b.ValueError: one"
    assert last_line("") == "no output"
