"""Background work of the engine.  Each task is about one container, and is cancelled when the engine stops."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from skep.aio.failures import isolate
from skep.aio.groups import errors_as_they_are

T = TypeVar("T")


class Background:
    """Tasks that run while ``running`` does.  An error ends only the task in which it happens."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._group: asyncio.TaskGroup | None = None

    @property
    def is_running(self) -> bool:
        """Whether work can start.  False before ``running`` and while the process is stopping."""
        return self._group is not None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Accept work until the block ends, then cancel unfinished work."""
        async with errors_as_they_are(), asyncio.TaskGroup() as group:
            self._group = group
            try:
                yield
            finally:
                self._group = None  # otherwise a start could still add its watch, which nothing would cancel
                for task in tuple(self._tasks):
                    task.cancel()

    def spawn(self, work: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        """Start ``work``.  Its error is logged."""
        if self._group is None:
            work.close()
            raise RuntimeError("containers are used outside of running()")
        task = self._group.create_task(isolate(work, "container task failed", work=name), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: work.close())  # never started if cancelled before
        return task

    async def carry_out(self, work: Coroutine[Any, Any, T], *, name: str) -> T:
        """Return the result of ``work``, which continues if the caller is cancelled.

        Raises the error of ``work``, or logs it if the caller was cancelled.  The end of ``running`` cancels the work
        and the caller, while ``run_to_end`` would finish the work.
        """
        if self._group is None:
            return await work
        outcome: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        async def whole() -> None:
            try:
                result = await work
            except Exception as error:
                if outcome.cancelled():  # its caller, which awaited it, was cancelled
                    raise
                outcome.set_exception(error)
            else:
                if not outcome.cancelled():
                    outcome.set_result(result)

        task = self.spawn(whole(), name=name)
        task.add_done_callback(lambda _: outcome.cancel())
        task.add_done_callback(lambda _: work.close())  # as in ``spawn``
        return await outcome
