"""Driver of the control loops: everything that waits, written once.

A control loop has two files.  ``state.py`` is plain Python without an ``await``: it queues the keys that a commit
affects, and decides which changes a due key needs.  ``loop.py`` says in which order due keys are decided and written.
The driver does the rest: it follows the store, coalesces keys, cuts decisions into time slices, keeps an error in one
object from stopping the others, and retries what failed with growing delays.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from typing import Generic, Protocol, TypeAlias, TypeVar

import msgspec

from skep.aio.clock import Clock
from skep.aio.time_slices import TimeSlices, run_in_slices
from skep.errors import SkepError
from skep.manager.control_loops.failures import Failures, write_each
from skep.manager.control_loops.informer import CatchUp, run_exact_informer
from skep.manager.control_loops.work_queue import WorkQueue
from skep.store.interface import Commit, LoopStore, Object, Transaction, View

K = TypeVar("K", bound=str)
C = TypeVar("C")
R = TypeVar("R")


RECHECK_S = 0.1
"""Pause in seconds before a recheck whose time has passed.  A decision that does not advance would otherwise be made
again at once, and take all of the processor.
"""


class Recheck(msgspec.Struct, frozen=True):
    """Decide about the object again at ``at`` (monotonic seconds), or after a pause if that time has passed."""

    at: float

    def due_at(self, now: float) -> float:
        """Return when to decide again, always after ``now``."""
        return self.at if self.at > now else now + RECHECK_S


Decision: TypeAlias = Iterable[C | Recheck | None]
"""The changes that one key needs.  The driver may pause wherever a decision yields, and None is only such a point.

Changes that were yielded before an error are written, so a decision whose changes belong together yields them last.
"""


class LoopState(Protocol[K]):
    """The state of a control loop.  Nothing in it waits."""

    @property
    def queue(self) -> WorkQueue[K]:
        """The keys that are due now or later."""

    @property
    def failures(self) -> Failures:
        """The keys whose decision or write failed."""

    def start(self, snapshot: View) -> Iterator[None]:
        """Start over from a snapshot, which is valid until the first pause."""

    def on_commit(self, commit: Commit) -> None:
        """Queue the keys whose decision may change."""


class LoopDriver(Generic[K]):
    """Runs the state of one control loop."""

    def __init__(
        self, term: LoopStore, clock: Clock, state: LoopState[K], kinds: tuple[type[Object], ...], batch: int
    ) -> None:
        """Create a driver that follows objects of ``kinds`` and takes up to ``batch`` due keys in one pass."""
        self._term = term
        self._clock = clock
        self._state = state
        self._kinds = kinds
        self._batch = batch
        self._loading: Iterator[None] = iter(())
        self._catch_up: CatchUp
        self._jobs: asyncio.TaskGroup

    async def run(
        self,
        work: Callable[[list[K]], Awaitable[None]],
        *jobs: Callable[[], Coroutine[None, None, None]],
        has_rest: Callable[[], bool] = lambda: False,
    ) -> None:
        """Pass due keys to ``work`` until cancelled, and run ``jobs`` at the same time.

        All of them start again from a new snapshot if the watch lagged.

        Args:
            has_rest: Whether the last pass left something to do.  The next pass then begins at once, even if no key is
                due.
        """

        async def run_passes(catch_up: CatchUp) -> None:
            self._catch_up = catch_up
            await run_in_slices(self._loading, self._clock)
            async with asyncio.TaskGroup() as self._jobs:
                for job in jobs:
                    self.spawn(job(), job.__name__)
                while True:
                    queue = self._state.queue
                    keys = queue.take_due(self._batch) if has_rest() else await queue.take(self._batch)
                    await work(keys)
                    await asyncio.sleep(0)  # a pass without a write would not let others run

        await run_exact_informer(
            self._term,
            self._kinds,
            on_snapshot=self._on_snapshot,
            on_commit=self._state.on_commit,
            work=run_passes,
        )

    def _on_snapshot(self, snapshot: View) -> None:
        self._loading = self._state.start(snapshot)
        next(self._loading, None)

    def spawn(self, job: Coroutine[None, None, None], name: str) -> None:
        """Run ``job`` concurrently with the passes.  It is cancelled if the watch lagged."""
        self._jobs.create_task(job, name=name)

    async def catch_up(self) -> None:
        """Pass every commit that the view shows to the state, so that its records and the view agree."""
        await self._catch_up()

    async def decide(
        self, keys: Iterable[K], decide: Callable[[K], Decision[C]], what: str = ""
    ) -> list[tuple[K, C]]:
        """Return the changes that ``keys`` need, in time slices.  A key whose decision raises is decided again later.

        Args:
            what: What is decided, if a pass decides several things about a key.  Each fails on its own.
        """
        queue, failures, slices = self._state.queue, self._state.failures, TimeSlices(self._clock)
        decided: list[tuple[K, C]] = []
        await self._catch_up()
        for key in keys:
            name = f"{what} of {key}" if what else key
            with failures.caught(name):
                for change in decide(key):
                    if isinstance(change, Recheck):
                        queue.add_at(key, change.due_at(self._clock.monotonic()))
                    elif change is not None:
                        decided.append((key, change))
                    if await slices.yield_if_due():
                        await self._catch_up()
            if (failure := failures.of(name)) is not None:
                queue.add_at(key, failure.retry_at)
            if await slices.yield_if_due():
                await self._catch_up()
        return decided

    async def write(
        self, what: str, body: Callable[[Transaction, C], R], changes: Sequence[tuple[K, C]]
    ) -> Sequence[R | SkepError]:
        """Write each change in its own transaction, in as few raft entries as possible.

        The keys of refused changes are decided again later.  Returns one result or error per change.
        """
        if not changes:
            return ()
        results = await write_each(self._term, body, [change for _, change in changes])
        outcomes = zip((key for key, _ in changes), results, strict=True)
        self._state.failures.requeue_failed(self._state.queue, what, outcomes)
        return results
