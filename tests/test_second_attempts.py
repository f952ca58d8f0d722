"""What a whole run repeats, and that a repeated test still has its deadline."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TREE = Path(__file__).parents[1]

CONFTEST = """
from tests.support.harness.second_attempts import SecondAttempts

def pytest_configure(config):
    config.pluginmanager.register(SecondAttempts())
"""

FAILS_ONCE = """
from pathlib import Path

def test_it():
    mark = Path(__file__).with_suffix(".ran")
    first = not mark.exists()
    mark.touch()
    assert not first, "the first attempt"
"""

HANGS_AT_ITS_SECOND_ATTEMPT = """
import time
from pathlib import Path

def test_it():
    mark = Path(__file__).with_suffix(".ran")
    if mark.exists():
        time.sleep(600)
    mark.touch()
    raise AssertionError("the first attempt")
"""


ASKS_WITHOUT_A_DELAY = """
import socket

def test_it(pytestconfig):
    assert pytestconfig.failures_db.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
"""


def whole_run(root: Path, folder: str, test: str, *options: str) -> subprocess.CompletedProcess[str]:
    (root / folder).mkdir(parents=True)
    (root / "conftest.py").write_text(CONFTEST)
    (root / "pytest.ini").write_text("[pytest]\n")
    (root / folder / "test_one.py").write_text(test)
    repeating = ["--timeout", "2", "--reruns", "1", "--only-rerun", "Timeout", "--rerun-show-tracebacks"]
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "--import-mode=importlib",
            *repeating,
            *options,
            folder,
        ],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(TREE)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    "folder", ["tests/browser", "tests/component", "tests/contract", "tests/integration/node"]
)
def test_a_failed_test_of_real_processes_is_repeated_and_its_first_failure_is_shown(
    tmp_path: Path, folder: str
) -> None:
    ended = whole_run(tmp_path, folder, FAILS_ONCE)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "the first attempt" in ended.stdout
    assert "1 passed, 1 rerun" in ended.stdout


def test_a_failed_unit_test_is_not_repeated(tmp_path: Path) -> None:
    ended = whole_run(tmp_path, "tests/unit", FAILS_ONCE)
    assert "1 failed" in ended.stdout, ended.stdout + ended.stderr


def test_a_repeated_test_still_has_its_deadline(tmp_path: Path) -> None:
    ended = whole_run(tmp_path, "tests/integration", HANGS_AT_ITS_SECOND_ATTEMPT)
    assert "1 failed, 1 rerun" in ended.stdout, ended.stdout + ended.stderr
    assert "Timeout" in ended.stdout


def test_a_worker_asks_for_earlier_attempts_without_a_delay(tmp_path: Path) -> None:
    ended = whole_run(tmp_path, "tests/unit", ASKS_WITHOUT_A_DELAY, "-n", "1")
    assert ended.returncode == 0, ended.stdout + ended.stderr
