"""A pytest plugin that breaks one rule of the table of a container's life, so that a test shows that it notices.

``BROKEN_RULE="Signal in any state: nothing" pytest -p tests.support.harness.broken_rule tests/unit/engine``
"""

import os
from contextlib import ExitStack

import pytest

from sim.containers.mutants import MUTANTS
from sim.mutants import broken

VARIABLE = "BROKEN_RULE"
_held = ExitStack()


def pytest_configure(config: pytest.Config) -> None:
    """Break the rule until the end of the run."""
    (mutant,) = [one for one in MUTANTS if one.name == os.environ[VARIABLE]]
    _held.enter_context(broken(mutant))
    config.add_cleanup(_held.close)
