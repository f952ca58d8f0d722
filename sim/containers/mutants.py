"""Mutation tests of the table of a container's life.  Each rule is broken in turn, and simulated lives must detect
that.

``python -m sim.containers.mutants`` prints the table.  ``python -m sim.containers.mutants Rename "unmount root"``
judges only mutants whose names contain one of these words.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from msgspec.structs import replace

from sim.containers.run import simulate
from sim.mutants import Mutant, Patch, Verdict, judge
from skep.engine.lifecycle import machine
from skep.engine.lifecycle.machine import TABLE, Effect, LifeRule

SEEDS = 1000
SILENT = frozenset(
    {
        *(Effect.PUBLISH_UNMOUNT, Effect.SERVE_CLIENTS, Effect.REFUSE_CLIENTS, Effect.FORGET_SECRETS),
        *(Effect.FORGET_EXECS, Effect.FIND_SHARED, Effect.ADOPT_API),
    }
)
"""Effects that the rules of the simulation do not observe.  Other tests cover them."""


_CHANGES = "created or exited or running or paused"
_TASK = "Start in created, a task's with its networks"
_LEFT = "StartFailed in created or exited, the caller was cancelled"
_PLACES = "starts.py::test_no_more_than_the_places_start_at_the_same_moment"
_ENDS = "ends_during_operations.py"
_WAITS = (
    "lifecycle_table.py::test_what_reaches_the_networks_waits_until_those_of_earlier_processes_are_restored"
)
_UNFINISHED = "unfinished_lives.py"
_TABLE = "lifecycle_table.py"
_ADOPTED = "Adopted in created, a task's, not retired"
SHOWN_ELSEWHERE: Mapping[str, str] = {
    "Start in created or exited, by the policy, which no longer applies: missing": _TABLE,
    "Signal in any state: missing": _TABLE,
    "PauseFailed in any state: missing": _TABLE,
    "Exec in running: missing": _TABLE,
    "Probed in any state: missing": _TABLE,
    "Retire in any state: missing": _TABLE,
    "RemovalFailed in removing, the caller was cancelled: missing": _TABLE,
    "Start in removing: nothing": "starts.py::test_a_start_that_has_waited_for_a_removal_that_failed_is_refused",
    "Start in created, its volumes are not filled yet: nothing": "filled_volumes.py",
    f"{_TASK}, without secret variables: without take a start slot": _PLACES,
    f"{_TASK}: without take a start slot": _PLACES,
    "Start in created or exited: without its record": "restart_monitor.py",
    f"{_LEFT}: nothing": _PLACES,
    f"{_LEFT}: without unmount volumes": _PLACES,
    "Signal in paused, the signal ends a container: without check whether it is frozen": _ENDS,
    "Pause in any state: nothing": _ENDS,
    "Unpause in any state: nothing": _ENDS,
    "Frozen in any state: nothing": _ENDS,
    "Thawed in any state: nothing": _ENDS,
    "Disconnect in running or paused, its run is connected: without await the node's networks": _WAITS,
    f"Rename in {_CHANGES}: without await the node's networks": _WAITS,
    f"RenameFailed in {_CHANGES}: without rename back on its networks": "renames.py",
    "PauseFailed in running or paused: nothing": _UNFINISHED,
    "PauseFailed in running or paused: without check whether it is frozen": _UNFINISHED,
    "Retire in created, it belongs to a task: without delete process and cgroups": _UNFINISHED,
    "RemoveContainer in running or paused: without its record": _UNFINISHED,
    "RemoveContainer in any state: without await the last run's release": _UNFINISHED,
    "Adopted in running or paused: without its record": _UNFINISHED,
    f"{_ADOPTED}, without its networks: without delete process and cgroups": _UNFINISHED,
}
"""Mutants that no rule of the simulation shows, and the test in ``tests/unit/engine/test_`` that does."""
EQUIVALENT = frozenset(
    {"Adopted in created or exited, a run has left resources behind: without unmount volumes"}
)
"""Mutants that change nothing.  The next process unmounts all volumes without a user once it has adopted all
containers, and a container that does not run is not a user.
"""


def mutants() -> Iterator[Mutant]:
    """Yield mutants for each rule: without its consequences, or without the rule if it has none, without its change of
    the record, and without each of its effects.
    """
    for number, rule in enumerate(TABLE):
        name = described(rule)
        if rule.effects or rule.record or rule.to or rule.then or rule.refusal:
            nothing = LifeRule(states=rule.states, event=rule.event, when=rule.when)
            yield _mutant(f"{name}: nothing", number, nothing)
        else:
            yield _mutant(f"{name}: missing", number, None)
        if rule.effects and (rule.record or rule.to):
            yield _mutant(f"{name}: without its record", number, replace(rule, record=None, to=None))
        for effect in dict.fromkeys(rule.effects):
            if effect not in SILENT:
                left = tuple(one for one in rule.effects if one is not effect)
                yield _mutant(f"{name}: without {effect.value}", number, replace(rule, effects=left))


def described(rule: LifeRule) -> str:
    """Return event, states and condition of a rule."""
    states = "any state" if rule.states == machine.ANY else " or ".join(one.value for one in rule.states)
    condition = f", {rule.when.__doc__}" if rule.when is not None else ""
    return f"{rule.event.__name__} in {states}{condition}"


def _mutant(name: str, number: int, broken: LifeRule | None) -> Mutant:
    return Mutant(name, name, partial(_patches, number, broken), simulate, SEEDS)


def _patches(number: int, broken: LifeRule | None) -> list[Patch]:
    table = [*TABLE[:number], *(() if broken is None else (broken,)), *TABLE[number + 1 :]]
    by_event = {rule.event: tuple(one for one in table if one.event is rule.event) for rule in table}
    return [Patch(machine, "TABLE", tuple(table)), Patch(machine, "_BY_EVENT", by_event)]


MUTANTS = tuple(mutants())


def _judge(number: int) -> Verdict:
    return judge(MUTANTS[number])


def main() -> int:
    """Print the table.  Return 1 if a mutant survived."""
    parser = argparse.ArgumentParser(prog="python -m sim.containers.mutants", description="Mutation tests.")
    parser.add_argument("words", nargs="*", metavar="WORDS", help="default: all mutants")
    parser.add_argument("--processes", type=int, help="default: one per processor")
    args = parser.parse_args()
    survived, known = 0, SHOWN_ELSEWHERE.keys() | EQUIVALENT
    chosen = [
        number
        for number, one in enumerate(MUTANTS)
        if not args.words or any(word in one.name for word in args.words)
    ]
    with ProcessPoolExecutor(args.processes) as pool:
        for verdict in pool.map(_judge, chosen):
            seed = "never" if verdict.seed is None else verdict.seed
            survived += verdict.seed is None and verdict.mutant not in known
            found = verdict.violation.splitlines()[-1] if verdict.violation else ""
            sys.stdout.write(f"{verdict.mutant:<90}{seed:>6}{verdict.seconds:>7.1f}  {found}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{len(chosen)} mutants, {survived} survived\n")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
