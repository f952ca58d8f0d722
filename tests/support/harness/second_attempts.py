"""In whole runs a failed test of real processes runs once more, within its deadline (decision 80)."""

import socket
from collections.abc import Sequence

import pytest
import pytest_timeout

REAL = ("tests/browser/", "tests/component/", "tests/contract/", "tests/integration/")
"""Folders whose tests wait for processes, sockets and kernels.  The code alone decides on all other tests."""


class SecondAttempts:
    """A plugin that marks repeatable tests, in runs that repeat tests, and keeps the deadlines."""

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Let a worker of pytest-xdist ask its controller for earlier attempts without a delay.

        Before each test pytest-rerunfailures sends a message without a response, and then a question. The kernel holds
        the question back until the message is acknowledged, for up to 40 ms: more than most tests take.
        """
        attempts = getattr(session.config, "failures_db", None)
        if (connection := getattr(attempts, "sock", None)) is not None:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: Sequence[pytest.Item]) -> None:
        if config.getoption("reruns"):
            for item in items:
                if item.nodeid.startswith(REAL):
                    item.add_marker(pytest.mark.flaky(reruns=1, only_rerun="(?s)."))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        # pytest-timeout removes a test's timer at its first failure, so a repeated test would have none.
        if getattr(item, "execution_count", 1) > 1:
            settings = pytest_timeout._get_item_settings(item)
            item.config.pluginmanager.hook.pytest_timeout_set_timer(item=item, settings=settings)
