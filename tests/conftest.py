"""What all tests share: needs of the machine, and a record of which tests ran (for docs/status.md)."""

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import settings

# How long an example takes says something of the machine, not of the code.
settings.register_profile("skep", deadline=None)
settings.load_profile("skep")

INTEGRATION_NEEDS = ("root", "runc", "conmon", "nft", "ip", "tini-static", "busybox", "docker", "etcd")
"""What every test in tests/integration needs; others say so by ``pytest.mark.needs(...)``."""

SEARCHED = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin:{Path(sys.prefix) / 'libexec' / 'skep'}"
"""Where commands are looked for: the path, and what set-up only unpacked."""


def missing(needs: Sequence[str]) -> list[str]:
    """Which of ``needs`` this machine lacks: ``root``, or commands."""
    return [need for need in needs if not _present(need)]


def _present(need: str) -> bool:
    if need == "root":
        return os.geteuid() == 0
    return shutil.which(need, path=SEARCHED) is not None


class Outcomes:
    """Which tests ran in this session and how they ended, by node id without parameters."""

    def __init__(self) -> None:
        self.passed: set[str] = set()
        self.failed: set[str] = set()
        self.deselected: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.add(_bare(report.nodeid))
        elif report.when == "call" and report.passed:
            self.passed.add(_bare(report.nodeid))

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        self.deselected |= {_bare(item.nodeid) for item in items}


def _bare(nodeid: str) -> str:
    return nodeid.partition("[")[0]


_OUTCOMES = pytest.StashKey[Outcomes]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--whole",
        action="store_true",
        help="this is a whole run: every test that docs/status.md names has to have passed in it",
    )
    parser.addoption("--seed", type=int, help="run simulations with this seed alone")


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """With ``--seed``, a test over many seeds runs once, with that one."""
    seed = metafunc.config.getoption("--seed")
    markers = metafunc.definition.own_markers
    for index, marker in enumerate(markers):
        if seed is not None and marker.name == "parametrize" and marker.args[0] == "seed":
            markers[index] = pytest.mark.parametrize("seed", [seed]).mark


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_OUTCOMES] = outcomes = Outcomes()
    config.pluginmanager.register(outcomes)


@pytest.fixture
def outcomes(request: pytest.FixtureRequest) -> Outcomes:
    """The tests of this session so far."""
    return request.config.stash[_OUTCOMES]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The test that asks which tests ran comes last; integration tests come after all others."""

    def order(item: pytest.Item) -> int:
        if item.name == "test_every_test_that_the_status_names_ran":
            return 2
        return int(item.nodeid.startswith("tests/integration/"))

    items.sort(key=order)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test without what it needs fails; it is skipped only where somebody asked for that by SKEP_SKIP=1."""
    needs = [need for marker in item.iter_markers("needs") for need in marker.args]
    if item.nodeid.startswith("tests/integration/"):
        needs += INTEGRATION_NEEDS
    lacking = missing(needs)
    if not lacking:
        return
    reason = f"missing: {', '.join(dict.fromkeys(lacking))} (make setup, as root)"
    if may_skip(os.environ):
        pytest.skip(reason)
    pytest.fail(reason, pytrace=False)


def may_skip(environment: Mapping[str, str]) -> bool:
    """Never in continuous integration: there a missing part is a failure."""
    return environment.get("SKEP_SKIP") == "1" and not environment.get("CI")
