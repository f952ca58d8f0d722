"""Features that meet on purpose do no harm."""

import pytest

from sim.crossings import CROSSINGS
from sim.seeds import report, results


@pytest.mark.parametrize("name", CROSSINGS)
def test_features_that_meet_do_no_harm(name: str) -> None:
    (result,) = results([1], CROSSINGS[name])
    assert not result.violations, report(result)
