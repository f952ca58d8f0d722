"""Nodes of namespaces with a mesh each."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.networks.mesh_lab import MeshLab


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[MeshLab]:
    """Three nodes, IPv4 and IPv6."""
    async with MeshLab(tmp_path, 3, has_ipv6=True).running() as lab:
        yield lab
