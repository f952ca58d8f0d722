"""The same run with and without changes of leader ends alike."""

import pytest

from sim import differential
from sim.mutants import judge
from sim.seeds import report, results
from tests.sim.test_mutants import by_name

SEEDS = 60
QUICK = 6


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "seeds", [range(QUICK), pytest.param(range(QUICK, SEEDS), marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_a_change_of_leader_changes_nothing(seeds: range) -> None:
    failed = [report(result) for result in results(seeds, differential.simulate) if result.violations]
    assert not failed, "\n\n".join(failed)


def test_a_scenario_is_generated_beforehand_and_some_have_changes_of_leader() -> None:
    assert differential.generated(3) == differential.generated(3)
    assert any(differential.generated(seed).moves for seed in range(QUICK))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["observations", pytest.param("counts", marks=pytest.mark.slow)])
def test_a_leader_that_dates_events_to_its_election_is_found(name: str) -> None:
    assert judge(by_name(name), seeds=SEEDS).seed is not None
