"""docs/promises.md is true: each test and file that it names exists.  Whether they ran is asked after a whole run."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.harness.promises import (
    HARDENING,
    ROOT,
    TALKS,
    Outcomes,
    exists,
    named_tests,
    not_shown,
    rows,
    shown_by,
)

A, B = "tests/unit/test_a.py", "tests/unit/test_b.py"


def test_every_promise_is_shown_by_something() -> None:
    assert [row[0] for row in rows() if not shown_by(row)] == []


def test_whatever_the_promises_name_exists() -> None:
    names = [name for row in rows() for name in shown_by(row)]
    assert [name for name in names if not exists(name)] == []


def test_whatever_the_page_of_failures_and_attacks_names_exists() -> None:
    table = rows(HARDENING)
    assert len(table) > 80
    assert [row[0] for row in table if not shown_by(row)] == []
    assert [name for row in table for name in shown_by(row) if not exists(name)] == []


def test_the_tests_of_the_talks_are_asked_for_except_those_that_few_machines_run() -> None:
    names = named_tests()
    assert "tests/integration/test_tutorials.py::test_what_a_page_shows_is_so" in names, "without parameters"
    rare = "tests/integration/node/test_network_volumes.py"
    assert rare in TALKS.read_text()
    assert [name for name in names if name.startswith(rare) or "[" in name] == []


def outcomes() -> Outcomes:
    """Of ``A`` two passed; of ``B`` one passed with one of two parameters, one is slow, one failed at its end."""
    found = Outcomes()
    for id in (f"{A}::test_one", f"{A}::test_two[x]", f"{B}::test_one[x]", f"{B}::test_ends_badly"):
        found.add(id, phase="call", has_passed=True, has_failed=False)
    found.add(f"{B}::test_one[y]", phase="call", has_passed=False, has_failed=True)
    found.add(f"{B}::test_ends_badly", phase="teardown", has_passed=False, has_failed=True)
    found.add(f"{B}::test_skipped", phase="setup", has_passed=False, has_failed=False)
    found.leave_out([f"{B}::test_slow[x]"])
    return found


@pytest.mark.parametrize("name", [f"{A}::test_one", f"{A}::test_two", A, f"{B}::test_slow"])
def test_what_passed_or_is_slow_is_shown(name: str) -> None:
    assert not_shown([name], outcomes()) == []


@pytest.mark.parametrize(
    "name",
    [
        f"{B}::test_one",
        f"{B}::test_ends_badly",
        f"{B}::test_skipped",
        f"{B}::test_gone",
        B,
        "tests/unit",
        "tests/sim",
    ],
)
def test_what_failed_or_did_not_run_is_not_shown(name: str) -> None:
    assert not_shown([name], outcomes()) == [name]


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_whole_run_fails_when_a_named_test_did_not_run(workers: str, tmp_path: Path) -> None:
    """The question at its end, after a run of nearly nothing."""
    words = ("--whole", "-q", "-n", workers, "--basetemp", str(tmp_path / "run"), "-p", "no:cacheprovider")
    command = [sys.executable, "-m", "pytest", *words, "tests/test_needs.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    _, _, named = done.stdout.partition("talks.md names tests that did not pass")
    assert "tests/contract/test_store.py" in named.split()
    assert (
        "tests/integration/test_stacks_of_the_talks.py::test_portainer_finds_its_agents_and_they_their_cluster"
        in (named.split())
    ), "a test of the talks alone"
    assert "tests/test_needs.py" not in named.split()
