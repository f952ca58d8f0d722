"""What all tests share: options, their order, needs of the machine."""

import gc
import os
import platform
import re
import shutil
import sys
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path

import pytest
import structlog
from hypothesis import settings

from skep.aio.event_loop import gc_settings
from tests.support.harness import order
from tests.support.harness.alone import Turns
from tests.support.harness.second_attempts import SecondAttempts
from tests.support.harness.tracebacks import ShownTracebacks
from tests.support.harness.whole_run import WholeRun

# How long an example takes says something of the machine, not of the code.
settings.register_profile("skep", deadline=None)
# Of make unit.  The continuous integration tries as many examples of each property as Hypothesis does by default.
settings.register_profile("quick", settings.get_profile("skep"), max_examples=20)
settings.load_profile("skep")

# The default renders every logged error with its source and variables, which takes a second for each.
structlog.configure(
    processors=[
        *structlog.get_config()["processors"][:-1],
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback),
    ]
)

INTEGRATION_NEEDS = ("root", "runc", "conmon", "nft", "ip", "tini", "busybox", "docker", "etcd")
"""What every test in tests/integration needs; others say so by ``pytest.mark.needs(...)``."""

NAME_OF_ONE_PROCESS = re.compile(r"frozenset\(|\{<\w+[.]| at 0x[0-9a-f]")
"""What stands in the ``repr`` of a set or of an object: pytest-xdist then collects different tests."""

SEARCHED = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin:{Path(sys.prefix) / 'libexec' / 'skep'}"
"""Where commands are looked for: the path, and what set-up only unpacked."""


def missing(needs: Sequence[str]) -> list[str]:
    """Which of ``needs`` this machine lacks: ``root``, or commands."""
    return [need for need in needs if not _present(need)]


def _present(need: str) -> bool:
    if need == "root":
        return os.geteuid() == 0
    return shutil.which(need, path=SEARCHED) is not None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--whole",
        action="store_true",
        help="at the end, ask for every test of the pages of promises and talks",
    )
    parser.addoption("--seed", type=int, help="run simulations with this seed alone")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(WholeRun(config), "skep-whole-run")
    config.pluginmanager.register(SecondAttempts(), "skep-second-attempts")
    config.pluginmanager.register(ShownTracebacks(), "skep-shown-tracebacks")
    if hasattr(config, "workerinput"):
        turns = Turns(config.rootpath / "Makefile", config.rootpath / "pyproject.toml")
        config.pluginmanager.register(turns, "skep-turns")


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """With ``--seed``, a test over many seeds runs once, with that one."""
    seed = metafunc.config.getoption("--seed")
    markers = metafunc.definition.own_markers
    for index, marker in enumerate(markers):
        if seed is not None and marker.name == "parametrize" and marker.args[0] == "seed":
            markers[index] = pytest.mark.parametrize("seed", [seed]).mark


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Integration tests come after all others, or among them in workers; names are the same in every process."""
    if not may_have_chromium():
        left_out = [item for item in items if item.get_closest_marker("chromium")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    if passing := [item.nodeid for item in items if NAME_OF_ONE_PROCESS.search(item.nodeid)]:
        raise pytest.UsageError(f"the name of a test differs from process to process: {passing[0]}")
    if hasattr(config, "workerinput"):
        items[:] = order.spread(items)
    else:
        items.sort(key=lambda item: item.nodeid.startswith("tests/integration/"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keep all modules and collected tests out of garbage collections, which would scan millions of objects in vain."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc_settings.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test whose requirements are missing fails; with SKEP_SKIP=1 it is skipped."""
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


def may_have_chromium() -> bool:
    """Whether it is there, or ``setup/browser.sh`` can install it: Ubuntu's package is a snap."""
    return shutil.which("chromium") is not None or platform.freedesktop_os_release()["ID"] == "debian"


def may_skip(environment: Mapping[str, str]) -> bool:
    """Never in continuous integration: there a missing part is a failure."""
    return environment.get("SKEP_SKIP") == "1" and not environment.get("CI")
