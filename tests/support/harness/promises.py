"""Reads docs/promises.md and docs/conformance/talks.md: the tests that they name, and whether these ran and passed."""

import ast
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from tests.support.harness.sources import parsed

ROOT = Path(__file__).parents[3]
PROMISES = ROOT / "docs" / "promises.md"
HARDENING = ROOT / "docs" / "conformance" / "hardening.md"
"""A page of the same form."""
TALKS = ROOT / "docs" / "conformance" / "talks.md"
"""A page whose last column names tests."""
UNTESTED = ROOT / "docs" / "untested.md"
"""A page whose second column names the tests that few machines run."""


class Outcomes:
    """Outcomes of a session's tests, by id without parameters."""

    def __init__(self) -> None:
        self.passed: set[str] = set()
        self.failed: set[str] = set()
        self.left_out: set[str] = set()

    def add(self, id: str, *, phase: str, has_passed: bool, has_failed: bool) -> None:
        """Record the result of one phase of a test (``setup``, ``call``, ``teardown``)."""
        if has_failed:
            self.failed.add(bare(id))
        elif phase == "call" and has_passed:
            self.passed.add(bare(id))

    def leave_out(self, ids: Iterable[str]) -> None:
        """Record that these tests do not run, because they are slow."""
        self.left_out |= {bare(id) for id in ids}


def bare(id: str) -> str:
    """Return the id of a test without its parameters."""
    return id.partition("[")[0]


def rows(page: Path = PROMISES) -> list[list[str]]:
    """Return the cells of every row of the page's tables: the promise, and the tests that show it."""
    lines = [line for line in page.read_text().splitlines() if line.startswith("|")]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [
        cells
        for cells in table
        if cells[0] not in ("promise", "what is true") and not set(cells[0]) <= set("-: ")
    ]


def shown_by(row: list[str]) -> list[str]:
    """Return the texts in backquotes in the row's second cell."""
    return re.findall(r"`([^`]+)`", row[1])


def named_tests() -> list[str]:
    """Return the ids of all tests that promises and talks name, and the test files that they name as a whole.

    Leaves out files with tests that few machines run, which are skipped elsewhere.
    """
    rare = {name.partition("::")[0] for row in rows(UNTESTED) for name in shown_by(row)}
    cells = [row[-1] for page in (PROMISES, TALKS) for row in rows(page)]
    names = {bare(name) for cell in cells for name in re.findall(r"`(tests/[^`]+)`", cell)}
    return sorted(name for name in names if name.partition("::")[0] not in rare)


def not_shown(names: Collection[str], outcomes: Outcomes) -> list[str]:
    """Return those ``names`` that neither passed nor were left out as slow.  A file or folder fails with any of its
    tests.
    """

    def ran_well(name: str) -> bool:
        def is_meant(test: str) -> bool:
            return test == name or test.startswith((f"{name}::", f"{name}/"))

        fine = outcomes.passed | outcomes.left_out
        return any(map(is_meant, fine)) and not any(map(is_meant, outcomes.failed))

    return [name for name in names if not ran_well(name)]


def exists(name: str) -> bool:
    """Return whether a file or a test (``path::function`` or ``path::Class::method``) exists."""
    path, *inside = name.split("::")
    file = ROOT / path
    if not inside:
        return file.exists()
    return file.is_file() and _defines(parsed(file), inside)


def _defines(tree: ast.Module | ast.ClassDef, names: list[str]) -> bool:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and [node.name] == names:
            return True
        if isinstance(node, ast.ClassDef) and node.name == names[0] and _defines(node, names[1:]):
            return True
    return False
