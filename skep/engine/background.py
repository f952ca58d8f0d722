"""Work of the engine in the background: each piece is about one container, and ends with the engine at the latest."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from skep.aio.failures import isolate
from skep.aio.groups import errors_as_they_are

T = TypeVar("T")


class Background:
    """Tasks, as long as ``running``; an error of one ends that alone."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._group: asyncio.TaskGroup | None = None

    @property
    def is_running(self) -> bool:
        """Whether anything can begin; if not, this process ends or has not begun."""
        return self._group is not None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Take work until the block ends, which cancels what is under way."""
        async with errors_as_they_are(), asyncio.TaskGroup() as group:
            self._group = group
            try:
                yield
            finally:
                self._group = None  # or what still starts would add its watch, which nothing ends
                for task in tuple(self._tasks):
                    task.cancel()

    def spawn(self, work: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        """Begin ``work``; its error is logged."""
        if self._group is None:
            work.close()
            raise RuntimeError("containers are used outside of running()")
        task = self._group.create_task(isolate(work, "container's work ended", work=name), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: work.close())  # of one that was cancelled before it began
        return task

    async def carry_out(self, work: Coroutine[Any, Any, T], *, name: str) -> T:
        """The result of ``work``, which goes on without its caller if that is cancelled.

        Its error is its caller's, and logged if that has gone.  What is cut off by the end of ``running`` is cancelled
        for its caller, too: unlike after ``run_to_end``, that end waits for nothing.
        """
        if self._group is None:
            return await work
        outcome: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        async def whole() -> None:
            try:
                result = await work
            except Exception as error:
                if outcome.cancelled():  # with its caller, who awaits it
                    raise
                outcome.set_exception(error)
            else:
                if not outcome.cancelled():
                    outcome.set_result(result)

        task = self.spawn(whole(), name=name)
        task.add_done_callback(lambda _: outcome.cancel())
        task.add_done_callback(lambda _: work.close())  # as in ``spawn``
        return await outcome
