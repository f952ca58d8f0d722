"""The rigs on which one suite runs: the fake and the real thing."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from skep.store.interface import Store
from tests.support.store.store_rigs import Rig, etcd_rig, memory_rig


@pytest.fixture(params=["memory", pytest.param("etcd", marks=pytest.mark.needs("etcd", "setpriv"))])
async def rig(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Rig]:
    """Two managers' stores on one cluster, in memory and on a real etcd."""
    async with memory_rig() if request.param == "memory" else etcd_rig(tmp_path) as rig:
        yield rig


@pytest.fixture
def store(rig: Rig) -> Store:
    """The store of one manager."""
    return rig.store
