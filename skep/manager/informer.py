"""Informer of a control loop: a snapshot of the store, then every commit, while the loop's work runs beside it.

Commit handlers are synchronous and only queue keys, so the watch never falls behind because of the work.  The work
takes the queued keys when it gets to them, and handles what has accumulated in one step.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TypeVar

import msgspec
import structlog

from skep.manager.failures import handle_isolated
from skep.store.interface import Commit, LoopStore, Object, View, Watch, WatchLagged
from skep.store.updates import batched

log = structlog.get_logger()

T = TypeVar("T", bound=msgspec.Struct)

BATCH = 250
"""Objects handled between two pauses while all objects of a kind are read; a few microseconds each."""


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
    while True:
        try:
            async with term.watch(*kinds) as watch, asyncio.TaskGroup() as group:
                on_snapshot(watch.snapshot)
                group.create_task(_read(watch, on_commit), name="read")
                await work()
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
