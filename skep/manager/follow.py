"""How a control loop follows the store: a snapshot, then every commit, while its work goes on beside.

Commits are only *noted* (synchronously, so the watch is always read in time); the work looks at what was noted when
it gets to it, and so takes whatever has gathered meanwhile in one step.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import structlog

from skep.aio.slices import STEP
from skep.manager.guard import note_apart
from skep.store.interface import Commit, Object, Updates, View, Watch, WatchLagged

log = structlog.get_logger()


class State(Updates, Protocol):
    """What a control loop needs of the store: a term in production; a plain store will do, without the fence."""

    def view(self) -> View: ...

    def watch(self, *kinds: type[Object]) -> AbstractAsyncContextManager[Watch]: ...


async def follow(
    term: State,
    kinds: tuple[type[Object], ...],
    *,
    start: Callable[[View], None],
    note: Callable[[Commit], None],
    work: Callable[[], Awaitable[None]],
) -> None:
    """Run ``work`` until it fails or is cancelled; begin again from a fresh snapshot when the watch lagged.

    ``start`` is called with each snapshot before ``note`` is called with what follows it.  An object that ``note``
    makes nothing of is not noted, and ends nothing.
    """
    while True:
        try:
            async with term.watch(*kinds) as watch, asyncio.TaskGroup() as group:
                start(watch.snapshot)
                group.create_task(_read(watch, note), name="read")
                await work()
        except* WatchLagged:
            log.warning(
                "watch lagged, starting again from a snapshot", kinds=[kind.__name__ for kind in kinds]
            )


def all_of(view: Callable[[], View], *kinds: type[Object]) -> Iterator[Object | None]:
    """Every object of these kinds as it is when it is asked for, so there may be pauses: wherever None comes."""
    for kind in kinds:
        for number, id in enumerate(view().ids(kind)):
            found = view().lookup(kind, id)
            if found is not None:
                yield found
            if number % STEP == 0:
                yield None


async def _read(watch: Watch, note: Callable[[Commit], None]) -> None:
    async for commit in watch:
        note_apart(note.__qualname__, note, commit)
