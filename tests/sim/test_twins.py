"""The same life with and without changes of leader ends alike."""

import pytest

from sim import twins
from sim.mutants import judged
from sim.run import outcomes, report
from tests.sim.test_mutants import by_name

SEEDS = 60
QUICK = 6


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "seeds", [range(QUICK), pytest.param(range(QUICK, SEEDS), marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_a_change_of_leader_changes_nothing(seeds: range) -> None:
    failed = [report(outcome) for outcome in outcomes(seeds, twins.live) if outcome.violations]
    assert not failed, "\n\n".join(failed)


def test_a_life_is_drawn_beforehand_and_leadership_moves_in_some() -> None:
    assert twins.drawn(3) == twins.drawn(3)
    assert any(twins.drawn(seed).moves for seed in range(QUICK))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["judgement", pytest.param("counts", marks=pytest.mark.slow)])
def test_a_leader_that_takes_the_begin_of_its_term_for_what_happened_is_found(name: str) -> None:
    assert judged(by_name(name), seeds=SEEDS).seed is not None
