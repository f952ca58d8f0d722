"""docs/status.md is true: each test and file that it names exists, and the tests ran and passed."""

import ast
import re
from pathlib import Path

import pytest

from tests.conftest import Outcomes

ROOT = Path(__file__).parents[1]
STATUS = ROOT / "docs" / "status.md"


def rows() -> list[list[str]]:
    """The cells of every row of the page's tables: point, what it asks, what shows it, state."""
    lines = [line for line in STATUS.read_text().splitlines() if line.startswith("|")]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [cells for cells in table if cells[0] != "point" and not set(cells[0]) <= set("-: ")]


def shown_by(row: list[str]) -> list[str]:
    """What stands in backquotes in the row's third cell."""
    return re.findall(r"`([^`]+)`", row[2])


def named_tests() -> list[str]:
    """Ids of all tests that the page names, and files of tests of which it means every one."""
    return sorted({name for row in rows() for name in shown_by(row) if name.startswith("tests/")})


def test_every_row_has_a_known_state() -> None:
    states = {row[3] for row in rows()}
    assert states <= {"open", "partly", "shown"}


def test_a_point_is_shown_only_by_something() -> None:
    assert [row[0] for row in rows() if row[3] == "shown" and not shown_by(row)] == []


def test_whatever_the_status_names_exists() -> None:
    names = [name for row in rows() for name in shown_by(row)]
    assert [name for name in names if not exists(name)] == []


def test_every_test_that_the_status_names_ran(outcomes: Outcomes, request: pytest.FixtureRequest) -> None:
    """In a whole run only.  Tests that were left out because they are slow run in `make integration`."""
    if not request.config.getoption("--whole"):
        pytest.skip("only part of the tests runs")
    assert [name for name in named_tests() if not ran_well(name, outcomes)] == []


def ran_well(name: str, outcomes: Outcomes) -> bool:
    """Whether the test passed or was left out as slow; of a file or folder: some test of it, and none failed."""

    def is_meant(test: str) -> bool:
        return test == name or test.startswith((f"{name}::", f"{name}/"))

    fine = outcomes.passed | outcomes.deselected
    return any(map(is_meant, fine)) and not any(map(is_meant, outcomes.failed))


def exists(name: str) -> bool:
    """Whether a file or (``path::function`` or ``path::Class::method``) a test is there."""
    path, *inside = name.split("::")
    file = ROOT / path
    if not inside:
        return file.exists()
    return file.is_file() and _defines(ast.parse(file.read_text()), inside)


def _defines(tree: ast.Module | ast.ClassDef, names: list[str]) -> bool:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and [node.name] == names:
            return True
        if isinstance(node, ast.ClassDef) and node.name == names[0] and _defines(node, names[1:]):
            return True
    return False
