"""Do the rules find what they are there for?  Ten named rules of the product are broken, one at a time.

Each mutant replaces production functions at run time, and lives are lived until one goes wrong.  A mutant that lives
through all of them means that the workload, the faults or the rules of the simulation are too weak.

``python -m skep.sim.mutants`` prints the table.
"""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import msgspec

from skep.aio.clock import SystemClock
from skep.manager.dispatcher import loop as dispatcher_loop
from skep.manager.dispatcher import statuses
from skep.manager.orchestrator import restart, update
from skep.manager.scheduler import spread
from skep.manager.scheduler.accounting import Account
from skep.model.ids import NodeId, SessionId
from skep.model.node import Node
from skep.model.task import TaskStatus
from skep.node import revisions
from skep.sim.run import outcomes
from skep.store import transaction
from skep.store.etcd import batcher, store
from skep.store.interface import Transaction

SEEDS = 200


class Patch(msgspec.Struct, frozen=True):
    """``owner.name`` becomes ``value``."""

    owner: Any
    name: str
    value: Any


class Mutant(msgspec.Struct, frozen=True):
    """One broken rule."""

    name: str
    rule: str
    """What the product no longer does."""
    patches: Callable[[], list[Patch]]


class Verdict(msgspec.Struct, frozen=True):
    """How long a mutant lived.  ``seed`` None: through all lives."""

    mutant: str
    seed: int | None
    lives: int
    seconds: float
    violation: str = ""


def judged(mutant: Mutant, seeds: int = SEEDS) -> Verdict:
    """Live lives with the rule broken until one goes wrong."""
    clock = SystemClock()
    began = clock.monotonic()
    with broken(mutant):
        for lives, outcome in enumerate(outcomes(range(seeds)), 1):
            if outcome.violations:
                took_s = clock.monotonic() - began
                return Verdict(mutant.name, outcome.seed, lives, took_s, outcome.violations[0])
    return Verdict(mutant.name, None, seeds, clock.monotonic() - began)


@contextmanager
def broken(mutant: Mutant) -> Iterator[None]:
    """Run the block with the rule broken."""
    with ExitStack() as patches:
        for patch in mutant.patches():
            patches.enter_context(mock.patch.object(patch.owner, patch.name, patch.value))
        yield


# -- the mutants -----------------------------------------------------------------------------------------------------


def _unfenced() -> list[Patch]:
    real = batcher.Pending
    return [Patch(batcher, "Pending", lambda proposal, fence: real(proposal, None))]


def _any_session() -> list[Patch]:
    def careless(tx: Transaction, node_id: NodeId, session_id: SessionId) -> Node:
        return tx.get(Node, node_id)

    return [Patch(statuses, "require_session", careless)]


def _any_state() -> list[Patch]:
    def latest(stored: TaskStatus, reported: TaskStatus) -> TaskStatus | None:
        return reported if reported != stored else None

    return [Patch(statuses, "newer_status", latest)]


def _packed() -> list[Patch]:
    def fullest(self: spread.Spread) -> Account | None:
        accounts = self._accounting.accounts
        able = [accounts[id] for id, passes in self._candidates.can_pass.items() if passes]
        with_room = [account for account in able if self.has_room(account)]
        return max(with_room, key=self.copies, default=None)

    return [Patch(spread.Spread, "next", fullest)]


def _other_order() -> list[Patch]:
    real = update._Rollout.__init__

    def turned(self: update._Rollout, *args: Any) -> None:
        real(self, *args)
        self._starts_first = not self._starts_first

    return [Patch(update._Rollout, "__init__", turned)]


def _impatient() -> list[Patch]:
    return [Patch(dispatcher_loop, "grace_period", lambda period_s, **_: 0.8 * period_s)]


def _no_claims() -> list[Patch]:
    return [Patch(transaction.Writing, "_claim", lambda *_: None)]


def _any_revision() -> list[Patch]:
    return [Patch(revisions, "advanced", lambda seen, offered: offered)]


def _no_delay() -> list[Patch]:
    return [Patch(restart, "delay_s", lambda task: 0.0)]


def _stale_reads() -> list[Patch]:
    async def at_once(self: store.EtcdStore) -> None:
        return None

    return [Patch(store.EtcdStore, "barrier", at_once)]


def _sent_again() -> list[Patch]:
    async def settle(self: batcher.Batcher, entry: batcher.Entry, loads: int) -> None:
        self._requeue(entry.pending)

    return [Patch(batcher.Batcher, "_settle", settle)]


def _crowded_slots() -> list[Patch]:
    return [Patch(restart, "_waited_for", lambda slot, situation: [])]


MUTANTS: tuple[Mutant, ...] = (
    Mutant("fence", "the leader's writes compare the leader key", _unfenced),
    Mutant("session compare", "what a node says is written for its present session only", _any_session),
    Mutant("monotone states", "of two reports the further one stands", _any_state),
    Mutant("spread", "tasks of a service go to the nodes that have the fewest", _packed),
    Mutant("update order", "start-first and stop-first are what they say", _other_order),
    Mutant("grace period", "a node is down after three missed heartbeats, not after one", _impatient),
    Mutant("name claims", "a name belongs to one service", _no_claims),
    Mutant("revisions", "a node takes no assignments older than those it has seen", _any_revision),
    Mutant("restart delay", "a failed task is replaced after its delay", _no_delay),
    Mutant("barrier reads", "a read shows everything acknowledged before it", _stale_reads),
    Mutant("ticket", "a write of unknown outcome is settled before it is sent again", _sent_again),
    Mutant("one at a time", "a successor waits until what it replaces has stopped", _crowded_slots),
)


def main() -> int:
    """Print the table; gives 1 if a mutant lived."""
    sys.stdout.write(f"{'mutant':<18}{'found by seed':>14}{'lives':>7}{'seconds':>9}  violation\n")
    with ProcessPoolExecutor() as pool:
        verdicts = list(pool.map(_judged, range(len(MUTANTS))))
    for verdict in verdicts:
        seed = "never" if verdict.seed is None else verdict.seed
        sys.stdout.write(
            f"{verdict.mutant:<18}{seed:>14}{verdict.lives:>7}{verdict.seconds:>9.1f}  "
            f"{verdict.violation.splitlines()[0] if verdict.violation else ''}\n"
        )
    return 1 if any(verdict.seed is None for verdict in verdicts) else 0


def _judged(number: int) -> Verdict:
    return judged(MUTANTS[number])


if __name__ == "__main__":
    sys.exit(main())
