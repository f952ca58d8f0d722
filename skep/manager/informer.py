"""Informer of a control loop: a snapshot of the store, then every commit, while the loop's work runs beside it.

Commit handlers are synchronous and only queue keys, so the watch never falls behind because of the work.  The work
takes the queued keys when it gets to them, and handles what has accumulated in one step.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import TypeAlias, TypeVar

import msgspec
import structlog

from skep.manager.failures import handle_isolated
from skep.store.interface import Commit, LoopStore, Object, View, Watch, WatchLagged
from skep.store.updates import batched

log = structlog.get_logger()

T = TypeVar("T", bound=msgspec.Struct)

BATCH = 250
"""Objects or events handled between two pauses while all objects of a kind, or commits that wait, are read; a few
microseconds each."""

CatchUp: TypeAlias = Callable[[], Awaitable[None]]
"""Handles every commit that the view shows and that has not been read yet, with pauses.  None is unread at its end."""


async def run_informer(
    term: LoopStore,
    kinds: tuple[type[Object], ...],
    *,
    on_snapshot: Callable[[View], None],
    on_commit: Callable[[Commit], None],
    work: Callable[[], Awaitable[object]],
) -> None:
    """Run ``work`` until it fails or is cancelled; start again from a fresh snapshot if the watch lagged.

    ``on_snapshot`` is called with each snapshot, before ``on_commit`` is called with the commits after it.  An event
    that makes ``on_commit`` raise is logged and skipped.
    """
    await run_exact_informer(term, kinds, on_snapshot=on_snapshot, on_commit=on_commit, work=lambda _: work())


async def observe_commits(
    store: LoopStore,
    kinds: tuple[type[Object], ...],
    *,
    on_snapshot: Callable[[View], None],
    on_commit: Callable[[Commit], None],
) -> None:
    """``run_informer`` for what records commits and has no work beside that, until cancelled."""
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
    """``run_informer`` for work that decides by what ``on_commit`` records, such as the time of a change.

    ``work`` is called with a ``CatchUp``.  Without it work that runs first after a commit finds objects in the view of
    which nothing was recorded.
    """
    while True:
        try:
            async with term.watch(*kinds) as watch, asyncio.TaskGroup() as group:
                on_snapshot(watch.snapshot)
                group.create_task(_read(watch, on_commit), name="read")
                await work(partial(_read_waiting, watch, on_commit))
        except* WatchLagged:
            log.warning("watch lagged, resyncing from a snapshot", kinds=[kind.__name__ for kind in kinds])


def batches_of(view: Callable[[], View], kind: type[T]) -> Iterator[Sequence[T]]:
    """Every object of ``kind`` in batches, each read when the iterator is advanced, so the caller may pause between
    them."""
    for ids in batched(view().ids(kind), BATCH):
        now = view()
        yield [found for id in ids if (found := now.lookup(kind, id)) is not None]


async def _read(watch: Watch, on_commit: Callable[[Commit], None]) -> None:
    async for commit in watch:
        handle_isolated(on_commit.__qualname__, on_commit, commit)
        await _read_waiting(watch, on_commit)


async def _read_waiting(watch: Watch, on_commit: Callable[[Commit], None]) -> None:
    """Both readers take the oldest commit and handle it before the next pause, so commits stay in order."""
    handled = 0
    for commit in watch.waiting():
        handle_isolated(on_commit.__qualname__, on_commit, commit)
        handled += len(commit.events)
        if handled >= BATCH:
            handled = 0
            await asyncio.sleep(0)
