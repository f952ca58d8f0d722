"""Runs transaction functions until they commit, in the optimistic retry loop that both stores share.

A function runs on the replica, and its writes are proposed.  A conflict means that the replica was behind, so the
function runs again once the replica has caught up.  An error of the function is final only if the replica is at least
as new as the call.  Otherwise a lagging replica could report "not found" for an object that was just created elsewhere.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeAlias, TypeVar

import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.errors import SkepError, Unavailable
from skep.store.interface import Object, Transaction, View, Watch
from skep.store.leadership import TermState
from skep.store.replica import Replica
from skep.store.transactions.proposal import Committed, Compare, Outcome, Proposal, WriteConflict
from skep.store.transactions.transaction import LocalTransaction

log = structlog.get_logger()

T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")

DEADLINE_S = 5.0
"""Timeout in seconds for an update with all its attempts."""

TERM_DEADLINE_S = 20.0
"""Timeout in seconds for an update of a term.  It is longer, because a timeout with a write in flight ends the term."""

SHOWN_S = 2.0
"""Seconds for the replica to show an acknowledged write of a user, after which the update returns anyway."""

CHUNK = 500
"""Number of proposals of one ``update_each`` that are in flight together."""

CONFLICTS_MAX = 3
"""Number of consecutive conflicts without progress after which each further attempt is delayed, longer each time.

Without the delay, a replica that has a wrong revision of a key would fill the raft log with attempts.
"""

YIELD_EVERY = 50
"""Number of bodies that run before other tasks of the event loop run."""

NO_LEADER = (
    "The swarm does not have a leader. It's possible that too few managers are online. "
    "Make sure more than half of the managers are online."
)
"""Docker's error text for a cluster without quorum."""

Propose: TypeAlias = Callable[
    [Sequence[Proposal], TermState | None], Awaitable[Sequence[Outcome | SkepError]]
]
"""Commits proposals independently of each other, fenced by the term if one is passed.  Returns one result per proposal,
in order.

A result may be an error: NotLeader if the fence failed, Unavailable without a quorum or with an unknown outcome.

Raises the same errors if they apply to all, and ResourceExhausted if too many proposals are queued.
"""


class Updater:
    """Base of a store and of a term, which runs transactions on a replica.  Implements ``interface.Updates``."""

    def __init__(
        self,
        replica: Replica,
        propose: Propose,
        barrier: Callable[[], Awaitable[None]],
        reached: Callable[[int], Awaitable[None]],
        clock: Clock,
        *,
        rng: Callable[[], float] = random.random,
        term: TermState | None = None,
    ) -> None:
        """Create an updater.

        Args:
            barrier: Returns once the replica shows every write acknowledged before the call.
            reached: Returns once the replica shows a revision.
            rng: Returns numbers from 0 to 1, which spread the delays between attempts.
            term: Its updates return only once the replica shows their write, because a leader that does not see its own
                write would repeat its decision.  If the replica does not show the write in time, the term is over.
        """
        self.replica = replica
        self._propose = propose
        self._barrier = barrier
        self._reached = reached
        self._clock = clock
        self._rng = rng
        self._term = term
        self._deadline_s = TERM_DEADLINE_S if term is not None else DEADLINE_S
        self._written = 0
        """The last revision that a term has written."""

    def view(self) -> View:
        """See ``interface.Store.view``."""
        return self.replica.state

    def rehearsal(self) -> Transaction:
        """See ``interface.Store.rehearsal``."""
        return LocalTransaction(self.replica.state, self._clock.now_ns())

    def watch(self, *kinds: type[Object]) -> AbstractAsyncContextManager[Watch]:
        """See ``interface.Store.watch``."""
        return self.replica.watch(*kinds)

    async def update(
        self, body: Callable[Concatenate[Transaction, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """See ``interface.Updates.update``."""
        is_confirmed = False
        delay = self._conflict_delay()
        tried: tuple[Compare, ...] = ()
        async with within_deadline(self._deadline_s, self._settle_cancelled) as deadline:
            await self._own_writes_shown()
            while True:
                try:
                    result, proposal = self._run(lambda tx: body(tx, *args, **kwargs))
                except SkepError:
                    if is_confirmed:
                        raise
                    before = self.replica.revision
                    await self._barrier()
                    is_confirmed = True
                    if self.replica.revision == before:
                        raise
                    continue
                if proposal.is_empty:
                    return result
                (outcome,) = await self._propose([proposal], self._term)
                match outcome:
                    case Committed(revision):
                        await self._wait_shown(revision, deadline)
                        return result
                    case WriteConflict(revision):
                        await self._reached(revision)
                        await delay.after_conflict(is_progress=proposal.compares != tried)
                        tried = proposal.compares
                        is_confirmed = False
                    case SkepError():
                        raise outcome

    async def update_each(
        self, body: Callable[[Transaction, T], R], items: Iterable[T], /
    ) -> Sequence[R | SkepError]:
        """See ``interface.Updates.update_each``."""
        pending = list(enumerate(items))
        results: list[Any] = [None] * len(pending)
        for chunk in batched(pending, CHUNK):
            delay = self._conflict_delay()
            try:
                async with within_deadline(self._deadline_s, self._settle_cancelled) as deadline:
                    await self._own_writes_shown()
                    while left := await self._attempt(body, chunk, results, deadline):
                        await delay.after_conflict(is_progress=len(left) < len(chunk))
                        chunk = left
            except Unavailable as error:
                for index, _ in chunk:
                    results[index] = error
        return results

    async def _attempt(
        self,
        body: Callable[[Transaction, T], R],
        chunk: Sequence[tuple[int, T]],
        results: list[Any],
        deadline: "within_deadline",
    ) -> list[tuple[int, T]]:
        """Run the body for each item and propose the result, once.  Returns the items that had a conflict.

        The bodies of the next items run while the proposals of earlier items are in flight.
        """
        proposing: list[tuple[list[tuple[int, T]], asyncio.Task[Sequence[Outcome | SkepError]]]] = []
        async with asyncio.TaskGroup() as group:
            for some in batched(chunk, YIELD_EVERY):
                items, proposals = self._run_each(body, some, results)
                if proposals:
                    proposing.append((items, group.create_task(self._outcomes(proposals), name="propose")))
                await asyncio.sleep(0)
        conflicts: list[tuple[int, T]] = []
        revision = 0
        for items, task in proposing:
            for (index, item), outcome in zip(items, task.result(), strict=True):
                match outcome:
                    case Committed(reached):
                        revision = max(revision, reached)
                    case WriteConflict(reached):
                        revision = max(revision, reached)
                        conflicts.append((index, item))
                    case SkepError():
                        results[index] = outcome
        await self._wait_shown(revision, deadline)
        return conflicts

    def _run_each(
        self, body: Callable[[Transaction, T], R], some: Sequence[tuple[int, T]], results: list[Any]
    ) -> tuple[list[tuple[int, T]], list[Proposal]]:
        """Run the body for each item and set its result in ``results``.  Returns the items that wrote something, and
        their proposals.
        """
        items: list[tuple[int, T]] = []
        proposals: list[Proposal] = []
        for index, item in some:
            try:
                results[index], proposal = self._run(partial(_swapped, body, item))
            except SkepError as error:
                results[index] = error
            else:
                if not proposal.is_empty:
                    items.append((index, item))
                    proposals.append(proposal)
        return items, proposals

    async def _outcomes(self, proposals: Sequence[Proposal]) -> Sequence[Outcome | SkepError]:
        try:
            outcomes = await self._propose(proposals, self._term)
            self._written = max(
                self._written, *(one.revision for one in outcomes if isinstance(one, Committed)), 0
            )
            return outcomes
        except SkepError as error:
            return [error] * len(proposals)

    def fenced(self, term: TermState) -> "FencedTerm":
        """Return an updater for the same replica whose writes are fenced by ``term``."""
        return FencedTerm(
            *(self.replica, self._propose, self._barrier, self._reached, self._clock),
            rng=self._rng,
            term=term,
        )

    def _run(self, body: Callable[[Transaction], R]) -> tuple[R, Proposal]:
        tx = LocalTransaction(self.replica.state, self._clock.now_ns())
        result = body(tx)
        return result, tx.proposal()

    def _conflict_delay(self) -> "_ConflictDelay":
        return _ConflictDelay(self._clock, Backoff(0.01, 0.5, rng=self._rng))

    async def _wait_shown(self, revision: int, deadline: "within_deadline") -> None:
        """Wait until the replica shows an acknowledged write.  A timeout is not an error, because the write has
        succeeded.
        """
        self._written = max(self._written, revision)
        if self.replica.revision >= revision:
            return None
        if self._term is not None:
            return await self._reached(revision)
        deadline.extend(SHOWN_S + 1)
        try:
            async with asyncio.timeout(SHOWN_S):
                await self._reached(revision)
        except TimeoutError:
            log.warning("acknowledged write not shown by the replica", revision=revision)

    async def _own_writes_shown(self) -> None:
        if self._term is not None:
            await self._reached(self._written)

    async def _settle_cancelled(self) -> None:
        """Wait for the outcome of the writes of an update that its deadline or its caller has cancelled."""
        if self._term is not None and self.replica.revision < self._written:
            await self._term.settle(partial(self._reached, self._written))


class FencedTerm(Updater):
    """A term, whose proposals compare the fence.  Created by ``Updater.fenced``.  Implements ``interface.Term``."""

    @property
    def number(self) -> int:
        return self._state.number

    @property
    def fence(self) -> int:
        """Revision of the leader key that began the term."""
        return self._state.fence

    @property
    def _state(self) -> TermState:
        assert self._term is not None, "made by Updater.fenced"
        return self._term

    async def confirm(self) -> None:
        """Propose a transaction that only compares the fence."""
        async with within_deadline(self._deadline_s):
            (outcome,) = await self._propose([Proposal()], self._state)
            match outcome:
                case Committed(revision) | WriteConflict(revision):
                    await self._reached(revision)
                case SkepError():
                    raise outcome

    async def wait_lost(self) -> None:
        await self._state.wait_lost()


class _ConflictDelay:
    """The delays between the attempts of one update."""

    def __init__(self, clock: Clock, backoff: Backoff) -> None:
        self._clock = clock
        self._backoff = backoff
        self._conflicts = 0

    async def after_conflict(self, *, is_progress: bool) -> None:
        """Wait, except after the first few conflicts.  ``is_progress``: whether the state has changed since the last
        conflict.
        """
        self._conflicts = 0 if is_progress else self._conflicts + 1
        if self._conflicts >= CONFLICTS_MAX:
            await self._backoff.sleep(self._clock)


def batched(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Split ``items`` into runs of ``size``."""
    return (items[start : start + size] for start in range(0, len(items), size))


def _swapped(body: Callable[[Transaction, T], R], item: T, tx: Transaction) -> R:
    return body(tx, item)


class within_deadline:  # noqa: N801 (it is used like a function)
    """Raise Unavailable if the block takes longer.

    ``cancelled`` is awaited first, also if the block is cancelled from outside.  This is a class because a context
    manager made from a generator would cost more than the timeout itself.
    """

    def __init__(
        self, seconds: float = DEADLINE_S, cancelled: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        self._timeout = asyncio.timeout(seconds)
        self._cancelled = cancelled

    def extend(self, seconds: float) -> None:
        """Let the block run for at least ``seconds`` from now."""
        end = self._timeout.when()
        assert end is not None, "it was set at the beginning"
        self._timeout.reschedule(max(end, asyncio.get_running_loop().time() + seconds))

    async def __aenter__(self) -> "within_deadline":
        await self._timeout.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            try:
                if self._cancelled is not None and isinstance(error, asyncio.CancelledError):
                    await self._cancelled()
            finally:
                await self._timeout.__aexit__(kind, error, traceback)
            if isinstance(error, TimeoutError):
                raise error
        except TimeoutError as late:
            raise Unavailable(NO_LEADER) from late
