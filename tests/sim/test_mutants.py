"""A broken rule of the product is noticed by the rules of the simulation; all of them are `make mutants`."""

import inspect
from collections.abc import Callable
from inspect import Parameter
from typing import Any

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
        ("scaling growth", 10),
        ("dry run", 1),
        ("visits", 1),
        ("unreported data", 1),
        ("required jobs", 1),
        ("gone nodes", 1),
        ("root rotation", 1),
        ("cron overlap", 1),
        ("volume scope", 1),
        ("job TTL", 1),
        ("most nodes lost", 1),
        ("max replicas", 1),
        ("keep", 1),
        ("reconnection", 1),
        ("used secrets", 1),
        ("secrets of runs", 1),
        ("failed update", 1),
        ("victims", 1),
        ("upgrade lock", 20),
        ("stack removal", 1),
        ("stack stop", 1),
        ("former specs", 1),
        ("spec numbers", 1),
        *(
            pytest.param(name, seeds, marks=pytest.mark.slow)
            for name, seeds in (
                *(
                    (name, 1)
                    for name in ("cron reasons", "cron nodes", "due times", "due once", "run attempts")
                ),
                *((name, 1) for name in ("volume sharing", "volume writers", "start first", "job TTL kept")),
                *((name, 1) for name in ("overdue update", "updates end", "spec versions", "history")),
                *((name, 1) for name in ("preemption off", "preemption on", "waiting tasks", "quota")),
                *((name, 1) for name in ("attempts", "visits of a task", "budget of labels", "freezes")),
                *((name, 40) for name in ("scaling range", "scaling window", "scaling updates")),
                *((name, 60) for name in ("causes", "adopt", "address held", "subnet released")),
                ("subnet held", 100),
                ("devices", 40),
                ("reboots", 160),
            )
        ),
    ],
)
def test_a_broken_rule_is_found(name: str, seeds: int) -> None:
    assert judge(by_name(name), seeds=seeds).seed is not None


@pytest.mark.parametrize("name", ["existence", "own barrier", "no gap", "raft's term"])
def test_a_broken_rule_of_the_store_is_found_by_runs_of_the_store_alone(name: str) -> None:
    assert judge(by_name(name), seeds=60).seed is not None


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda one: one.name)
def test_a_broken_rule_replaces_functions_that_exist_and_takes_their_arguments(mutant: Mutant) -> None:
    patches = mutant.patches()
    assert patches
    for patch in patches:
        real = getattr(patch.owner, patch.name)
        if inspect.isfunction(real):
            assert_takes_the_arguments_of(real, patch.value)


def assert_takes_the_arguments_of(real: Callable[..., Any], broken: Callable[..., Any]) -> None:
    parameters = inspect.signature(real).parameters.values()
    positional = [
        one for one in parameters if one.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    ]
    named = {one.name: None for one in parameters if one.kind is Parameter.KEYWORD_ONLY}
    inspect.signature(broken).bind(*positional, **named)  # raises TypeError
    assert inspect.iscoroutinefunction(broken) == inspect.iscoroutinefunction(real)


def test_at_least_ten_rules_are_broken_and_each_is_whole_again_afterwards() -> None:
    assert len({mutant.name for mutant in MUTANTS}) >= 10
    assert SEEDS == 200
    real = LocalTransaction._claim
    with broken(by_name("name claims")):
        assert LocalTransaction._claim is not real
    assert LocalTransaction._claim is real
