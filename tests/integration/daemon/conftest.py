"""Daemons of a test's own."""

import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.support.clients.front_rig import Rig
from tests.support.machines.daemon_rig import DaemonRig, daemon_rig


@pytest.fixture
def rig() -> Iterator[DaemonRig]:
    """A daemon that is not started yet.  Its directory is short: sockets have short paths."""
    with (
        tempfile.TemporaryDirectory(prefix="skep-", dir="/var/tmp") as directory,
        daemon_rig(Path(directory)) as rig,
    ):
        yield rig


@pytest.fixture
async def front_rig(tmp_path: Path) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(rig.front())
        yield rig
