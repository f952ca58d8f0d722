"""Daemons of a test's own."""

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.support.clients.front_rig import Rig
from tests.support.machines.daemon_rig import DaemonRig, daemon_rig
from tests.support.machines.directories import a_directory


@pytest.fixture
def rig() -> Iterator[DaemonRig]:
    """A daemon that is not started yet."""
    with a_directory("skep-") as directory, daemon_rig(directory) as rig:
        yield rig


@pytest.fixture
async def front_rig(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    """Its parameters are those of the rig."""
    rig = Rig(tmp_path, **getattr(request, "param", {}))
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(rig.front())
        yield rig
