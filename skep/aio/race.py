"""Runs two coroutines until the first ends, or a coroutine to its end despite cancellation."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

T = TypeVar("T")


class LostRace(Exception):
    """The preempting coroutine returned first, and the work has been cancelled."""


async def run_unless(work: Coroutine[Any, Any, T], preempting: Coroutine[Any, Any, object]) -> T:
    """Return the result of ``work``, or raise its error, once both coroutines have ended.

    Raises: LostRace: ``preempting`` returned first.
    """
    async with asyncio.TaskGroup() as group:
        working = group.create_task(_outcome(work))
        other = group.create_task(preempting)
        await asyncio.wait((working, other), return_when=asyncio.FIRST_COMPLETED)
        working.cancel()
        other.cancel()
    if working.cancelled():
        raise LostRace
    result, error = working.result()
    if error is not None:
        raise error
    return result  # type: ignore[return-value]  # without an error there is a result


async def wait_first(one: Coroutine[Any, Any, object], other: Coroutine[Any, Any, object]) -> None:
    """Run both until one has returned.  The other one is cancelled and awaited."""
    try:
        await run_unless(one, other)
    except LostRace:
        return


async def run_to_end(work: Coroutine[Any, Any, T], on_cancelled: Callable[[], None] = lambda: None) -> T:
    """Run ``work`` to its end, even if the caller is cancelled once or several times, and return its result.

    Use it for short work that would leave something behind if it were interrupted.  ``on_cancelled`` is called at each
    cancellation.  Raises: any error of ``work``; CancelledError, once ``work`` has ended, if the caller was cancelled.
    """
    whole = asyncio.gather(_outcome(work))
    is_cancelled = False
    while not whole.done():
        try:
            await asyncio.wait((whole,))
        except asyncio.CancelledError:
            is_cancelled = True
            on_cancelled()
    if is_cancelled:
        whole.exception()  # otherwise asyncio would log at the end of the loop that it was not retrieved
        raise asyncio.CancelledError
    ((result, error),) = whole.result()
    if error is not None:
        raise error
    return result  # type: ignore[return-value]  # as above


async def _outcome(work: Coroutine[Any, Any, T]) -> tuple[T | None, Exception | None]:
    """Return result or error of ``work`` as a value: a task group would turn an error into a group."""
    try:
        return await work, None
    except Exception as error:
        return None, error


async def is_set_within(event: asyncio.Event, seconds: float | None) -> bool:
    """Wait until ``event`` is set, at most ``seconds`` unless that is None.  Return whether it is."""
    if seconds is None:
        return await event.wait()
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return False
    return True


@asynccontextmanager
async def afterwards(clean: Callable[[], Awaitable[object]]) -> AsyncIterator[None]:
    """Await ``clean()`` at the end of the block.

    It continues if the caller is cancelled once more meanwhile: half of a cleanup would leave something behind.
    """
    try:
        yield
    finally:
        await asyncio.shield(clean())


@asynccontextmanager
async def unless_done(undo: Callable[[], Awaitable[object]]) -> AsyncIterator[None]:
    """Await ``undo()`` if the block fails or is cancelled.  It continues as with ``afterwards``."""
    try:
        yield
    except BaseException:
        await asyncio.shield(undo())
        raise


async def thread_to_end(act: Callable[[], T], stop: Callable[[], None] = lambda: None) -> T:
    """Return the result of ``act`` in a thread, which has ended when this returns or is cancelled.

    ``stop`` lets it end soon after a cancellation.  Otherwise it would use what its caller frees.
    """
    return await run_to_end(asyncio.to_thread(act), stop)


class SharedWork:
    """Work that continues when its caller is cancelled.  A further caller meanwhile waits for the same work."""

    def __init__(self) -> None:
        self._running: asyncio.Future[tuple[Any]] | None = None

    async def run(self, work: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        """Do ``work``, or wait for the work of an earlier call.  Raises: any error of the work."""
        running = self._running
        if running is None or running.done():
            running = self._running = asyncio.gather(work())
            # Otherwise asyncio would log an error that no caller has awaited.
            running.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.shield(running)
