"""Simulated lives of containers: random runs, and broken rules of the table that they find."""

from collections import Counter

import pytest

from sim.containers.faults import Fate
from sim.containers.mutants import MUTANTS
from sim.containers.run import STEPS, Run, simulate
from sim.mutants import judge
from sim.seeds import chunked, quiet, report, results

pytestmark = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")  # of a crashed process

SEEDS = 10_000
QUICK = 200
CHUNK = 200


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "first",
    [
        pytest.param(seeds[0], marks=pytest.mark.slow if seeds[0] >= QUICK else ())
        for seeds in chunked(range(SEEDS), CHUNK)
    ],
)
def test_nothing_is_left_without_an_owner_and_the_last_request_counts(first: int) -> None:
    failed = [report(one) for one in results(range(first, first + CHUNK), simulate) if one.violations]
    assert not failed, "\n\n".join(failed)


@pytest.mark.timeout(300)
def test_each_call_crashes_fails_and_hangs_in_some_run() -> None:
    seen = Counter[tuple[str, Fate]]()
    with quiet():
        for seed in range(200):
            run = Run(seed, STEPS)
            try:
                run.result()
            finally:
                run.close()
            seen += run.faults.seen
    calls = {name for name, _ in seen}
    waiting = {
        "attach",
        "clear",
        "create",
        "delete",
        "detach",
        "discard",
        "mount",
        "pause",
        "start",
        "unmount",
    }
    assert waiting <= calls
    assert {(name, fate) for name in waiting for fate in Fate} <= seen.keys()


def test_a_run_is_reproduced_by_its_seed() -> None:
    assert simulate(3).trace == simulate(3).trace


FOUND = (
    *(
        "Create: nothing",
        "Attached: nothing",
        "BundleWritten: nothing",
        "ProcessCreated: nothing",
        "Started: nothing",
    ),
    *("UserStops: nothing", "RunEnded: nothing", "Exited: nothing", "ReleaseRun: without unmount root"),
    *("Discard: without remove directories", "Discarded: nothing"),
)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", FOUND)
def test_a_broken_rule_is_found(name: str) -> None:
    """``make mutants`` breaks all of them."""
    event, what = name.split(": ")
    broken = [
        one for one in MUTANTS if one.name.startswith(f"{event} in ") and one.name.endswith(f": {what}")
    ]
    assert broken
    for mutant in broken:
        assert judge(mutant).seed is not None
