"""At the end of a whole run (``--whole``), every test that the pages of promises and talks name must have passed.

With several workers (pytest-xdist) each runs a part of the tests, so their controller compares.
"""

from collections.abc import Sequence
from typing import Any

import pytest

from tests.support.harness.promises import Outcomes, named_tests, not_shown

_LEFT_OUT = "skep_left_out"


class WholeRun:
    """Records outcomes of tests.  After the last one it fails the run if a named test did not pass."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._outcomes = Outcomes()
        self._missing: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._outcomes.add(
            report.nodeid, phase=report.when or "", has_passed=report.passed, has_failed=report.failed
        )

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        self._outcomes.leave_out(item.nodeid for item in items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Merge the outcomes of a worker that has ended."""
        self._outcomes.leave_out(getattr(node, "workeroutput", {}).get(_LEFT_OUT, ()))

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if (output := getattr(self._config, "workeroutput", None)) is not None:
            output[_LEFT_OUT] = sorted(self._outcomes.left_out)
        elif self._config.getoption("--whole"):
            self._missing = not_shown(named_tests(), self._outcomes)
            if self._missing:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._missing:
            terminalreporter.section(
                "docs/promises.md or docs/conformance/talks.md names tests that did not pass"
            )
            for name in self._missing:
                terminalreporter.line(name)
