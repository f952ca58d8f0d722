"""Short runs of clusters with too little room, and services of different priorities."""

import pytest

from sim import priorities
from sim.seeds import report, results

QUICK, SEEDS = 10, 200


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "seeds", [range(QUICK), pytest.param(range(QUICK, SEEDS), marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_the_important_have_the_room_and_nothing_else_is_stopped_for_them(seeds: range) -> None:
    failed = [report(result) for result in results(seeds, priorities.simulate) if result.violations]
    assert not failed, "\n\n".join(failed)
