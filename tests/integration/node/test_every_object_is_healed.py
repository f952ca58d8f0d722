"""Whatever the kernel holds in a namespace of Skep's is taken away, one by one, and each is back.

How long each takes is measured by ``bench.healing``.
"""

from pathlib import Path

import pytest

from tests.support.networks.healing_lab import PLACES, healing_lab, taken_away


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("where", PLACES)
async def test_every_object_that_is_taken_away_is_back(tmp_path: Path, where: str) -> None:
    async with healing_lab(tmp_path) as spaces:
        never = [one async for one in taken_away(spaces, where) if one.seconds is None]
    assert not never, "\n".join(f"{one.command}: {one.difference}" for one in never)
