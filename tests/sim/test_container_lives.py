"""Simulated lives of containers: random runs, and broken rules of the table that they find."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sim.containers.faults import CALLS, Fate
from sim.containers.mutants import MUTANTS, SHOWN_ELSEWHERE
from sim.containers.run import RATES, STEPS, Run, simulate
from sim.mutants import judge
from sim.seeds import chunked, quiet, report, results
from tests.support.harness import broken_rule

pytestmark = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")  # of a crashed process

SEEDS = 10_000
QUICK = 200
CHUNK = 200
FOCUSED_RUNS = 300
"""Runs that focus on one call, of which a tenth suffices for most calls: a pause needs 67."""


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
    assert waiting <= set(CALLS), "a run may focus on each of them"
    with quiet():
        for name in waiting:
            assert _fates_of(name) == set(Fate)


def _fates_of(name: str) -> set[Fate]:
    """Return what happens to calls of one name in runs that focus on them, as far as is needed to see every fate."""
    seen: set[Fate] = set()
    for seed in range(FOCUSED_RUNS):
        run = Run(seed, STEPS)
        run.faults.focus, run.faults.rate = name, min(filter(None, RATES))
        try:
            run.result()
        finally:
            run.close()
        seen |= {fate for call, fate in run.faults.seen if call == name}
        if seen == set(Fate):
            break
    return seen


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


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if number else ())
        for number, name in enumerate(SHOWN_ELSEWHERE)
    ],
)
def test_a_rule_that_no_simulation_breaks_is_broken_for_another_test(name: str) -> None:
    assert name in {one.name for one in MUTANTS}
    test = f"tests/unit/engine/test_{SHOWN_ELSEWHERE[name]}"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n0",
        "-x",
        "-p",
        "tests.support.harness.broken_rule",
        test,
    ]
    ended = subprocess.run(
        command,
        env={**os.environ, broken_rule.VARIABLE: name},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == pytest.ExitCode.TESTS_FAILED, ended.stdout + ended.stderr
