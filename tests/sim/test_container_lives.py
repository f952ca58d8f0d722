"""Simulated lives of containers: random runs, and broken rules of the table that they find."""

import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import pytest

from sim.containers.faults import CALLS, SHORT, Fate
from sim.containers.mutants import MUTANTS, SHOWN_ELSEWHERE
from sim.containers.run import RATES, STEPS, Run, simulate
from sim.mutants import judge
from sim.seeds import chunked, quiet, report, results
from skep.engine.lifecycle.machine import Effect
from tests.support.harness import broken_rule

pytestmark = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")  # of a crashed process

SEEDS = 10_000
QUICK = 200
CHUNK = 200
FOCUSED_RUNS = 600
"""Runs that focus on one call.  A twentieth suffices for most calls, but not for renames that fail twice."""
ACTS = {
    Effect.MAKE_DIRECTORIES: ("make", SHORT),
    Effect.ATTACH_NETWORKS: ("attach", Fate),
    Effect.WRITE_BUNDLE: ("prepare", SHORT),
    Effect.MOUNT_VOLUMES: ("mount", Fate),
    Effect.CREATE_PROCESS: ("create", Fate),
    Effect.START_COMMAND: ("start", Fate),
    Effect.WATCH: ("wait", SHORT),
    Effect.SEND_SIGNAL: ("signal", SHORT),
    Effect.FREEZE: ("pause", Fate),
    Effect.THAW: ("resume", Fate),
    Effect.THAW_FOR_SIGNAL: ("resume", Fate),
    Effect.APPLY_LIMITS: ("update", Fate),
    Effect.CHANGE_NETWORKS: ("connect", Fate),
    Effect.WRITE_NAME_FILES: ("name files", SHORT),
    Effect.RENAME_ON_NETWORKS: ("rename", Fate),
    Effect.RENAME_BACK: ("rename", Fate),
    Effect.DELETE_PROCESS: ("delete", Fate),
    Effect.ENSURE_DELETED: ("delete", Fate),
    Effect.DETACH_NETWORKS: ("detach", Fate),
    Effect.CLEAR_CGROUPS: ("clear", Fate),
    Effect.RELEASE_ROOT: ("release", SHORT),
    Effect.UNMOUNT_VOLUMES: ("unmount", Fate),
    Effect.REMOVE_DIRECTORIES: ("discard", Fate),
}
"""Effects that change something outside of the process, each with a call that it makes, and the fates of that call.

All others wait or change only memory, so a crash in them is a crash between the calls before and after them.
"""


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
@pytest.mark.parametrize("effect", ACTS, ids=lambda effect: effect.value)
def test_each_effect_crashes_fails_and_hangs_in_some_run(effect: Effect) -> None:
    call, fates = ACTS[effect]
    assert call in CALLS, "a run may focus on it"
    seen: set[Fate | None] = set()
    with quiet():
        for seed in range(FOCUSED_RUNS):
            seen |= {fate for one, fate in _calls_of(seed, call) if one is effect}
            if seen >= set(fates):
                return
    raise AssertionError(f"it never has {set(fates) - seen}")


def test_an_effect_that_reaches_the_world_is_one_of_those_above() -> None:
    with quiet():
        seen = {one for seed in range(FOCUSED_RUNS // 4) for one, _ in _calls_of(seed, "")}
    assert seen - {None} <= ACTS.keys(), "each of those is seen above"


def _calls_of(seed: int, focus: str) -> Collection[tuple[Effect | None, Fate | None]]:
    """Return the calls of a run that focuses on calls of one name: the effect that makes each, and its fate."""
    run = Run(seed, STEPS)
    run.faults.focus, run.faults.rate = focus, min(filter(None, RATES))
    try:
        run.result()
    finally:
        run.close()
    return run.faults.in_effects


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
