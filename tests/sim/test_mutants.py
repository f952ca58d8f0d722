"""A broken rule of the product is noticed by the rules of the simulation; all of them are `make mutants`."""

import pytest

from sim.mutants import MUTANTS, SEEDS, Mutant, broken, judge
from skep.store.transactions.transaction import LocalTransaction


def by_name(name: str) -> Mutant:
    return next(mutant for mutant in MUTANTS if mutant.name == name)


@pytest.mark.parametrize(
    ("name", "seeds"),
    [
        ("name claims", 20),
        ("sequence", 20),
        ("host ports", 40),
        ("address released", 20),
        ("reports kept", 5),
        ("local volumes", 5),
        ("full disks", 5),
        ("dry run", 1),
        ("visits", 1),
        ("visits of a task", 1),
        ("root rotation", 1),
        ("cron overlap", 1),
        ("cron reasons", 1),
        ("cron nodes", 1),
        ("volume scope", 1),
        ("volume sharing", 1),
        ("volume writers", 1),
        ("job TTL", 1),
        ("job TTL kept", 1),
        ("most nodes lost", 1),
        ("max replicas", 1),
        ("failed update", 1),
        ("overdue update", 1),
        ("updates end", 1),
        ("victims", 1),
        ("preemption off", 1),
        ("preemption on", 1),
        ("scaling range", 10),
        ("scaling growth", 10),
        ("scaling window", 10),
        pytest.param("scaling updates", 40, marks=pytest.mark.slow),
        ("unreported data", 1),
        ("required jobs", 1),
        ("gone nodes", 1),
        ("upgrade lock", 20),
        pytest.param("causes", 60, marks=pytest.mark.slow),
        pytest.param("adopt", 60, marks=pytest.mark.slow),
        pytest.param("address held", 60, marks=pytest.mark.slow),
        pytest.param("subnet released", 60, marks=pytest.mark.slow),
        pytest.param("subnet held", 100, marks=pytest.mark.slow),
    ],
)
def test_a_broken_rule_is_found(name: str, seeds: int) -> None:
    assert judge(by_name(name), seeds=seeds).seed is not None


@pytest.mark.parametrize("name", ["existence", "own barrier", "no gap", "raft's term"])
def test_a_broken_rule_of_the_store_is_found_by_runs_of_the_store_alone(name: str) -> None:
    assert judge(by_name(name), seeds=60).seed is not None


def test_at_least_ten_rules_are_broken_and_each_is_whole_again_afterwards() -> None:
    assert len({mutant.name for mutant in MUTANTS}) >= 10
    assert SEEDS == 200
    real = LocalTransaction._claim
    with broken(by_name("name claims")):
        assert LocalTransaction._claim is not real
    assert LocalTransaction._claim is real
