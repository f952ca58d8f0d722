"""Running transaction functions until they commit: the loop that both stores share.

A function runs against the replica; what it wrote is proposed; a conflict means that the replica was behind, so
it catches up and the function runs again.  An error that the function raises is only believed on a state no
older than the call, so that a lagging replica cannot say "not found" of what was just created elsewhere.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import msgspec
import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.errors import SkepError, Unavailable
from skep.store.interface import Transaction
from skep.store.proposal import Compare, Proposal
from skep.store.replica import Replica
from skep.store.transaction import Writing

log = structlog.get_logger()

T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")

DEADLINE_S = 5.0
"""For a whole update with all its attempts."""

TERM_DEADLINE_S = 20.0
"""For one of a leader: nobody waits for it, and one that is given up with a write under way ends the term."""

LEFT_S = 8.0
"""How long a leader's cancelled update waits for what came of its write: for two entries on disks that are just about
quick enough."""

SHOWN_S = 2.0
"""How long a user's acknowledged write may take to show in the replica before it is answered anyway."""

CHUNK = 500
"""Proposals of one ``update_each`` that are under way together."""

CONFLICTS_MAX = 3
"""Conflicts in a row without progress after which each further attempt waits, longer each time: where this replica
takes a key for another one than it is, attempts alone would fill the log."""

BREATH = 50
"""Bodies run between two returns to the event loop."""

NO_LEADER = (
    "The swarm does not have a leader. It's possible that too few managers are online. "
    "Make sure more than half of the managers are online."
)
"""Docker's sentence for a cluster without quorum."""


class Committed(msgspec.Struct, frozen=True, gc=False):
    """The proposal is in, at this revision."""

    revision: int


class Conflict(msgspec.Struct, frozen=True, gc=False):
    """A compare failed.  The reason is visible at this revision at the latest."""

    revision: int


Outcome = Committed | Conflict


class Proposer(Protocol):
    """The way to the store: a lane of API writes, or one fenced by a term."""

    async def propose(self, proposals: Sequence[Proposal]) -> Sequence[Outcome | SkepError]:
        """The outcome of each, independent of the others, in order.

        An error instead: NotLeader: the fence fell; Unavailable: not now, or the outcome could not be found out.
        Raises: the same, when it concerns all; ResourceExhausted: too many wait.
        """


class Held(Protocol):
    """A term, as far as its writers can end it."""

    @property
    def is_lost(self) -> bool:
        """Whether it is over."""

    def lose(self) -> None:
        """End it."""


async def leave(term: Held, settled: Callable[[], Awaitable[None]]) -> None:
    """For a term's writer that was cancelled, before it goes: wait until what it wrote is ``settled``, and shows.

    Whoever decides next has to see it: a loop that begins again from a snapshot, for instance.  Where that takes too
    long, the term is over: the next one begins with everything that was ever written.
    """
    if term.is_lost:
        return
    is_settled = False
    try:
        async with asyncio.timeout(LEFT_S):
            await settled()
        is_settled = True
    except (TimeoutError, SkepError) as error:
        log.warning("term ends, as a write of it has no known outcome", waited_s=LEFT_S, reason=str(error))
    finally:
        if not is_settled:
            term.lose()


class Updater:
    """Implements ``interface.Updates`` over a replica and a proposer."""

    def __init__(
        self,
        replica: Replica,
        proposer: Proposer,
        barrier: Callable[[], Awaitable[None]],
        clock: Clock,
        reached: Callable[[int], Awaitable[None]],
        *,
        chance: Callable[[], float] = random.random,
        term: Held | None = None,
    ) -> None:
        """
        Args:
            barrier: returns once the replica shows the present.
            reached: returns once the replica shows a revision.
            term: a write of it is answered when it shows, and nothing further is tried before: a leader that does not
                see what it wrote would decide the same again.  Where it does not show in time, the term is over.
            chance: numbers from 0 to 1, which spread the pauses between attempts.
        """
        self._replica = replica
        self._proposer = proposer
        self._barrier = barrier
        self._clock = clock
        self._reached = reached
        self._term = term
        self._deadline_s = TERM_DEADLINE_S if term is not None else DEADLINE_S
        self._chance = chance
        self._written = 0
        """The last revision of a term."""

    async def update(
        self, body: Callable[Concatenate[Transaction, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """See ``interface.Updates.update``."""
        is_confirmed = False
        pause = self._pause()
        tried: tuple[Compare, ...] = ()
        async with within_deadline(self._deadline_s, self._left) as deadline:
            await self._earlier_shown()
            while True:
                try:
                    result, proposal = self._run(lambda tx: body(tx, *args, **kwargs))
                except SkepError:
                    if is_confirmed:
                        raise
                    before = self._replica.revision
                    await self._barrier()
                    is_confirmed = True
                    if self._replica.revision == before:
                        raise
                    continue
                if proposal.is_empty:
                    return result
                (outcome,) = await self._proposer.propose([proposal])
                match outcome:
                    case Committed(revision):
                        await self._shown(revision, deadline)
                        return result
                    case Conflict(revision):
                        await self._reached(revision)
                        await pause.after_conflict(is_progress=proposal.compares != tried)
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
            pause = self._pause()
            try:
                async with within_deadline(self._deadline_s, self._left) as deadline:
                    await self._earlier_shown()
                    while left := await self._attempt(body, chunk, results, deadline):
                        await pause.after_conflict(is_progress=len(left) < len(chunk))
                        chunk = left
            except Unavailable as error:
                for index, _ in chunk:
                    results[index] = error
        return results

    async def confirm(self) -> None:
        """See ``interface.Term.confirm``."""
        async with within_deadline(self._deadline_s):
            (outcome,) = await self._proposer.propose([Proposal()])
            match outcome:
                case Committed(revision) | Conflict(revision):
                    await self._reached(revision)
                case SkepError():
                    raise outcome

    async def _attempt(
        self,
        body: Callable[[Transaction, T], R],
        chunk: Sequence[tuple[int, T]],
        results: list[Any],
        deadline: "within_deadline",
    ) -> list[tuple[int, T]]:
        """Run and propose each item once; gives back those that met a conflict.

        While some proposals are on their way, the bodies of the next ones run.
        """
        proposing: list[tuple[list[tuple[int, T]], asyncio.Task[Sequence[Outcome | SkepError]]]] = []
        async with asyncio.TaskGroup() as group:
            for some in batched(chunk, BREATH):
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
                    case Conflict(reached):
                        revision = max(revision, reached)
                        conflicts.append((index, item))
                    case SkepError():
                        results[index] = outcome
        await self._shown(revision, deadline)
        return conflicts

    def _run_each(
        self, body: Callable[[Transaction, T], R], some: Sequence[tuple[int, T]], results: list[Any]
    ) -> tuple[list[tuple[int, T]], list[Proposal]]:
        """Run the body of each item into ``results``; the items that wrote something, and what they propose."""
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
            outcomes = await self._proposer.propose(proposals)
            self._written = max(
                self._written, *(one.revision for one in outcomes if isinstance(one, Committed)), 0
            )
            return outcomes
        except SkepError as error:
            return [error] * len(proposals)

    def _run(self, body: Callable[[Transaction], R]) -> tuple[R, Proposal]:
        tx = Writing(self._replica.state, self._clock.now_ns())
        result = body(tx)
        return result, tx.proposal()

    def _pause(self) -> "_Pause":
        return _Pause(self._clock, Backoff(0.01, 0.5, chance=self._chance))

    async def _shown(self, revision: int, deadline: "within_deadline") -> None:
        """The write at ``revision`` is in: no deadline of its attempts makes an error of it any more."""
        self._written = max(self._written, revision)
        if self._replica.revision >= revision:
            return None
        if self._term is not None:
            return await self._reached(revision)
        deadline.extend(SHOWN_S + 1)
        try:
            async with asyncio.timeout(SHOWN_S):
                await self._reached(revision)
        except TimeoutError:
            log.warning("replica does not show an acknowledged write", revision=revision)

    async def _earlier_shown(self) -> None:
        if self._term is not None:
            await self._reached(self._written)

    async def _left(self) -> None:
        """The caller was cancelled, by its deadline or from outside."""
        if self._term is not None and self._replica.revision < self._written:
            await leave(self._term, partial(self._reached, self._written))


class _Pause:
    """Between the attempts of one update."""

    def __init__(self, clock: Clock, backoff: Backoff) -> None:
        self._clock = clock
        self._backoff = backoff
        self._conflicts = 0

    async def after_conflict(self, *, is_progress: bool) -> None:
        """None for the first few, then longer each time; ``is_progress``: something was seen to have changed."""
        self._conflicts = 0 if is_progress else self._conflicts + 1
        if self._conflicts >= CONFLICTS_MAX:
            await self._backoff.sleep(self._clock)


class Updating:
    """What a store and a term have in common: they are updated by an ``Updater``."""

    _updater: Updater

    async def update(
        self, body: Callable[Concatenate[Transaction, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """See ``interface.Updates.update``."""
        return await self._updater.update(body, *args, **kwargs)

    async def update_each(
        self, body: Callable[[Transaction, T], R], items: Iterable[T], /
    ) -> Sequence[R | SkepError]:
        """See ``interface.Updates.update_each``."""
        return await self._updater.update_each(body, items)


def batched(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """``items`` in runs of ``size``."""
    return (items[start : start + size] for start in range(0, len(items), size))


def _swapped(body: Callable[[Transaction, T], R], item: T, tx: Transaction) -> R:
    return body(tx, item)


class within_deadline:  # noqa: N801 (it is used like a function)
    """Raises: Unavailable: the block took longer.

    ``left``: awaited before, and as well when the block is cancelled from outside.
    A class, since a generator behind a context manager costs a small request more than the timeout itself.
    """

    def __init__(
        self, seconds: float = DEADLINE_S, left: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        self._timeout = asyncio.timeout(seconds)
        self._left = left

    def extend(self, seconds: float) -> None:
        """Let the block last so long from now on, at least."""
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
                if self._left is not None and isinstance(error, asyncio.CancelledError):
                    await self._left()
            finally:
                await self._timeout.__aexit__(kind, error, traceback)
            if isinstance(error, TimeoutError):
                raise error
        except TimeoutError as late:
            raise Unavailable(NO_LEADER) from late
