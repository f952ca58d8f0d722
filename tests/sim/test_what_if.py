"""What ``skep what-if`` predicts is what happens: the change is made, nothing else changes, and the cluster rests."""

import pytest

from sim.seeds import results
from sim.what_if import simulate

QUICK, SEEDS = 8, 300
"""Seeds that run always, and all seeds.  ``python -m sim --what-if --seeds 10000`` runs more."""


@pytest.mark.parametrize(
    "seed",
    [*range(QUICK), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(QUICK, SEEDS))],
)
def test_what_is_predicted_happens(seed: int) -> None:
    """The services with missing tasks are as predicted, with the numbers of their tasks and the kinds of reasons."""
    (result,) = results([seed], simulate)
    assert result.violations == []
