"""Daemons of a test's own."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.daemon.rig import DaemonRig, daemon_rig


@pytest.fixture
def rig() -> Iterator[DaemonRig]:
    """A daemon that is not started yet.  Its directory is short: sockets have short paths."""
    with (
        tempfile.TemporaryDirectory(prefix="skep-", dir="/var/tmp") as directory,
        daemon_rig(Path(directory)) as rig,
    ):
        yield rig
