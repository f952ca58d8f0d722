"""Short runs that focus on one part of the managers."""

import pytest

from sim import focused
from sim.seeds import Simulate, report, results

QUICK, SEEDS = 5, 100


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "simulate",
    [
        *(focused.allocations, focused.sessions, focused.reports),
        *(focused.volumes, focused.disks, focused.autoscaling, focused.stack_commands),
        focused.maintenance,
    ],
)
@pytest.mark.parametrize(
    "seeds", [range(QUICK), pytest.param(range(QUICK, SEEDS), marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_nothing_is_wrong_and_nothing_is_left_over(simulate: Simulate, seeds: range) -> None:
    failed = [report(result) for result in results(seeds, simulate) if result.violations]
    assert not failed, "\n\n".join(failed)
