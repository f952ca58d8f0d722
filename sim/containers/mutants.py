"""Mutation tests of the table of a container's life.  Each rule is broken in turn, and simulated lives must detect
that.

``python -m sim.containers.mutants`` prints the table.
"""

import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from msgspec.structs import replace

from sim.containers.run import simulate
from sim.mutants import Mutant, Patch, Verdict, judge
from skep.engine.lifecycle import machine
from skep.engine.lifecycle.machine import TABLE, Effect, Rule

SEEDS = 300
SILENT = frozenset(
    {
        *(Effect.PUBLISH_START, Effect.PUBLISH_PAUSE, Effect.PUBLISH_UNPAUSE, Effect.PUBLISH_EXIT),
        *(Effect.PUBLISH_UNMOUNT, Effect.PUBLISH_DESTROY, Effect.SERVE_CLIENTS, Effect.REFUSE_CLIENTS),
        *(Effect.FORGET_SECRETS, Effect.FORGET_EXECS, Effect.FIND_SHARED, Effect.ADOPT_API),
    }
)
"""Effects that the rules of the simulation do not observe.  Other tests cover them."""


SHOWN_ELSEWHERE = {
    "CreateFailed: without detach networks": "a sweep finds the namespace",
    "StartFailed: without detach networks": "a sweep finds the namespace",
    "Pause: nothing": "the runtime refuses as well",
    "Unpause: nothing": "the runtime refuses as well",
    "Frozen: nothing": "test_a_container_that_ends_while_it_is_paused_or_unpaused_stays_ended",
    "Thawed: nothing": "test_a_container_that_ends_while_it_is_paused_or_unpaused_stays_ended",
    "Start: nothing": "test_a_start_that_has_waited_for_a_removal_that_failed_is_refused",
}
"""Mutants that the simulation does not detect in each row of their event, with the reason, or with the test that
detects them.
"""


def mutants() -> Iterator[Mutant]:
    """Yield mutants: each rule without all its consequences, and each rule without one of its effects."""
    for number, rule in enumerate(TABLE):
        name = f"{number} {rule.event.__name__}"
        if rule.effects or rule.record or rule.to or rule.then or rule.refusal:
            yield _mutant(
                f"{name}: nothing", number, Rule(states=rule.states, event=rule.event, when=rule.when)
            )
        for effect in dict.fromkeys(rule.effects):
            if effect not in SILENT:
                left = tuple(one for one in rule.effects if one is not effect)
                yield _mutant(f"{name}: without {effect.value}", number, replace(rule, effects=left))


def _mutant(name: str, number: int, broken: Rule) -> Mutant:
    return Mutant(name, name, partial(_patches, number, broken), simulate, SEEDS)


def _patches(number: int, broken: Rule) -> list[Patch]:
    table = [broken if index == number else rule for index, rule in enumerate(TABLE)]
    by_event = {rule.event: tuple(one for one in table if one.event is rule.event) for rule in table}
    return [Patch(machine, "_BY_EVENT", by_event)]


MUTANTS = tuple(mutants())


def _judge(number: int) -> Verdict:
    return judge(MUTANTS[number])


def main() -> int:
    """Print the table.  Return 1 if a mutant survived."""
    survived = 0
    with ProcessPoolExecutor() as pool:
        for verdict in pool.map(_judge, range(len(MUTANTS))):
            seed = "never" if verdict.seed is None else verdict.seed
            survived += verdict.seed is None and verdict.mutant.split(" ", 1)[1] not in SHOWN_ELSEWHERE
            found = verdict.violation.splitlines()[-1] if verdict.violation else ""
            sys.stdout.write(f"{verdict.mutant:<62}{seed:>6}{verdict.seconds:>7.1f}  {found}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{len(MUTANTS)} mutants, {survived} survived\n")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
