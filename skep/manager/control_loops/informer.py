"""Informer of a control loop.  It reads a snapshot of the store, then every commit, while the loop's work runs
concurrently.

Commit handlers are synchronous and only queue keys, so slow work never makes the watch fall behind.  When the work is
ready, it takes all keys that have accumulated and handles them in one step.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import TypeAlias, TypeVar

import msgspec
import structlog

from skep.manager.control_loops.failures import handle_isolated
from skep.store.interface import Commit, LoopStore, Object, View, Watch, WatchLagged
from skep.store.transactions.updates import batched

log = structlog.get_logger()

T = TypeVar("T", bound=msgspec.Struct)

BATCH = 100
"""Objects or events handled before the loop yields to others; each takes a few microseconds."""

CatchUp: TypeAlias = Callable[[], Awaitable[None]]
"""Handles, with pauses, all commits that the view already shows.  When it returns, none is left."""


async def run_informer(
    term: LoopStore,
    kinds: tuple[type[Object], ...],
    *,
    on_snapshot: Callable[[View], None],
    on_commit: Callable[[Commit], None],
    work: Callable[[], Awaitable[object]],
) -> None:
    """Run ``work`` until it fails or is cancelled.  If the watch lags, restart from a fresh snapshot.

    ``on_snapshot`` is called with each snapshot, before ``on_commit`` is called with the commits after it.  If
    ``on_commit`` raises for an event, the error is logged and the event is skipped.
    """
    await run_exact_informer(term, kinds, on_snapshot=on_snapshot, on_commit=on_commit, work=lambda _: work())


async def observe_commits(
    store: LoopStore,
    kinds: tuple[type[Object], ...],
    *,
    on_snapshot: Callable[[View], None],
    on_commit: Callable[[Commit], None],
) -> None:
    """Run an informer that only records commits and has no work, until cancelled."""
    work = asyncio.Event().wait
    await run_informer(store, kinds, on_snapshot=on_snapshot, on_commit=on_commit, work=work)


async def run_exact_informer(
    term: LoopStore,
    kinds: tuple[type[Object], ...],
    *,
    on_snapshot: Callable[[View], None],
    on_commit: Callable[[Commit], None],
    work: Callable[[CatchUp], Awaitable[object]],
) -> None:
    """Run an informer whose work depends on data that ``on_commit`` records, such as the time of a change.

    ``work`` is called with a ``CatchUp``.  It needs that because the view may show objects of commits that have not
    been recorded yet.
    """
    while True:
        try:
            async with term.watch(*kinds) as watch, asyncio.TaskGroup() as group:
                on_snapshot(watch.snapshot)
                group.create_task(_read_commits(watch, on_commit), name="read")
                await work(partial(_read_waiting, watch, on_commit))
        except* WatchLagged:
            log.warning("watch lagged, resyncing from a snapshot", kinds=[kind.__name__ for kind in kinds])


def batches_of(view: Callable[[], View], kind: type[T]) -> Iterator[Sequence[T]]:
    """Yield every object of ``kind`` in batches.  Each batch is read when the iterator advances, so the caller may
    pause.
    """
    for ids in batched(view().ids(kind), BATCH):
        now = view()
        yield [found for id in ids if (found := now.lookup(kind, id)) is not None]


async def _read_commits(watch: Watch, on_commit: Callable[[Commit], None]) -> None:
    async for commit in watch:
        handle_isolated(on_commit.__qualname__, on_commit, commit)
        await _read_waiting(watch, on_commit)


async def _read_waiting(watch: Watch, on_commit: Callable[[Commit], None]) -> None:
    """Handle the waiting commits.

    Both readers take the oldest commit and handle it before the next pause, so commits stay in order.
    """
    handled = 0
    for commit in watch.waiting():
        handle_isolated(on_commit.__qualname__, on_commit, commit)
        handled += len(commit.events)
        if handled >= BATCH:
            handled = 0
            await asyncio.sleep(0)
