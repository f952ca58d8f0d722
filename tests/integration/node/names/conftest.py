"""A net process of the test's own, in the machine's namespace, with containers that are namespaces."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from skep.paths import Paths
from tests.support.networks.names_lab import NamesLab, forks


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[NamesLab]:
    paths = Paths(tmp_path / "data", tmp_path / "run")
    paths.run.mkdir()
    async with forks(paths) as started:
        lab = NamesLab(paths, started)
        try:
            await lab.start_process()
            yield lab
        finally:
            await lab.close()
