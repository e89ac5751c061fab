"""Tables are aligned by their widest cells."""

from se_inject.tables import markdown_table, text_table

HEADER = ("name", "count", "note")
ROWS = [("a", "1,000", "x"), ("longer", "2", "")]


def test_text():
    assert text_table(HEADER, ROWS, left=("name", "note")).splitlines() == [
        "name    count  note",
        "a       1,000  x",
        "longer      2"]
    assert text_table(HEADER, []) == "name  count  note"


def test_markdown():
    assert markdown_table(HEADER, ROWS, left=("name", "note")).splitlines() == [
        "| name | count | note |",
        "| --- | ---: | --- |",
        "| a | 1,000 | x |",
        "| longer | 2 |  |"]
