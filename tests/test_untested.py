"""The page of what never ran here: each row names a test that exists, and when and where it passed."""

import re
from pathlib import Path

from tests.support.harness.promises import exists

PAGE = Path(__file__).parents[1] / "docs" / "untested.md"
ROW = re.compile(r"^\| (?P<what>[^|]+) \| `(?P<test>[^`]+)` \| (?P<machine>[^|]+) \| (?P<date>[^|]+) \|$")


def test_every_row_of_the_page_names_a_test_and_when_and_where_it_passed() -> None:
    table = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and "---" not in line]
    rows = [ROW.match(line) for line in table[1:]]
    assert rows
    for line, row in zip(table[1:], rows, strict=True):
        assert row is not None, f"not of the form: what, `test`, machine, date: {line}"
        assert exists(row["test"])
        if row["date"] == "never":
            assert row["machine"] == "none"
        else:
            assert re.fullmatch(r"20\d\d-\d\d-\d\d", row["date"])
            assert row["machine"] != "none"
