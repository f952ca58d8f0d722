"""Short lives around the allocator and around sessions."""

import pytest

from sim import short
from sim.run import Live, outcomes, report

QUICK, SEEDS = 5, 100


@pytest.mark.timeout(300)
@pytest.mark.parametrize("live", [short.allocations, short.sessions])
@pytest.mark.parametrize(
    "seeds", [range(QUICK), pytest.param(range(QUICK, SEEDS), marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_nothing_is_wrong_and_nothing_is_left_over(live: Live, seeds: range) -> None:
    failed = [report(outcome) for outcome in outcomes(seeds, live) if outcome.violations]
    assert not failed, "\n\n".join(failed)
