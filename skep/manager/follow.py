"""How a control loop follows the store: a snapshot, then every commit, while its work goes on beside.

Commits are only *noted* (synchronously, so the watch is always read in time); the work looks at what was noted when
it gets to it, and so takes whatever has gathered meanwhile in one step.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol, TypeVar

import msgspec
import structlog

from skep.manager.guard import note_apart
from skep.store.interface import Commit, Object, Updates, View, Watch, WatchLagged
from skep.store.updates import batched

log = structlog.get_logger()

T = TypeVar("T", bound=msgspec.Struct)

PORTION = 250
"""Objects between two pauses of whoever goes through all of them: of a few microseconds each."""


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


def portions_of(view: Callable[[], View], kind: type[T]) -> Iterator[Sequence[T]]:
    """Every object of ``kind`` as it is when its portion is asked for, so there may be pauses between portions."""
    for ids in batched(view().ids(kind), PORTION):
        now = view()
        yield [found for id in ids if (found := now.lookup(kind, id)) is not None]


async def _read(watch: Watch, note: Callable[[Commit], None]) -> None:
    async for commit in watch:
        note_apart(note.__qualname__, note, commit)
