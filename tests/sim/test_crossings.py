"""Features that meet on purpose do no harm.  A run is skipped until its rule is in force."""

import pytest

from sim.crossings import CROSSINGS
from sim.invariants import in_force
from sim.seeds import report, results


@pytest.mark.parametrize("name", CROSSINGS)
def test_features_that_meet_do_no_harm(name: str) -> None:
    crossing = CROSSINGS[name]
    if not in_force.is_in_force(crossing.rule):
        pytest.skip(f"not in force: {crossing.rule}")
    (result,) = results([1], crossing.simulate)
    assert not result.violations, report(result)
