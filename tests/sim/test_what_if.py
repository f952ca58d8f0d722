"""What ``skep what-if`` predicts is what happens: the change is made, nothing else changes, and the cluster rests."""

from functools import partial

import pytest

from sim.seeds import results
from sim.what_if import Deploy, simulate

QUICK, SEEDS = 8, 300
QUICK_DEPLOYS, DEPLOYS = 4, 150
"""Seeds that run always, and all seeds.  ``python -m sim --what-if --seeds 10000`` runs more."""


@pytest.mark.parametrize(
    "seed",
    [*range(QUICK), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(QUICK, SEEDS))],
)
def test_what_is_predicted_happens(seed: int) -> None:
    """The services with missing tasks are as predicted, with the numbers of their tasks and the kinds of reasons."""
    (result,) = results([seed], simulate)
    assert result.violations == []


@pytest.mark.parametrize(
    "seed",
    [
        *range(QUICK_DEPLOYS),
        *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(QUICK_DEPLOYS, DEPLOYS)),
    ],
)
def test_what_is_predicted_of_a_deploy_happens(seed: int) -> None:
    """Services of all modes that run until they are stopped get another image."""
    (result,) = results([seed], partial(simulate, kind=Deploy))
    assert result.violations == []
