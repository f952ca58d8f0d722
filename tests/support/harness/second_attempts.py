"""In whole runs a failed test of real processes runs once more, within its deadline (decision 80)."""

from collections.abc import Sequence

import pytest
import pytest_timeout

REAL = ("tests/browser/", "tests/component/", "tests/contract/", "tests/integration/")
"""Folders whose tests wait for processes, sockets and kernels.  The code alone decides on all other tests."""


class SecondAttempts:
    """A plugin that marks repeatable tests, in runs that repeat tests, and keeps the deadlines."""

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
