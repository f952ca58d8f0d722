"""Calls of the system that may never return, such as a look at a file whose server is silent.

Each has a thread of its own that is left behind at the deadline: a thread of a pool that all other work shares would be
missed there, and the process could not end before it.
"""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from skep.errors import Unavailable

T = TypeVar("T")


class BlockingCalls:
    """``left_max``: threads that were left behind and still wait; with so many of them no further call is made."""

    def __init__(self, left_max: int = 64) -> None:
        self._left_max = left_max
        self._running = 0

    async def call(self, work: Callable[[], T], deadline_s: float) -> T:
        """The result of ``work``, which runs in a thread.

        Raises: TimeoutError: it takes longer, and goes on by itself; Unavailable: too many do so already; what
        ``work`` raises.
        """
        if self._running >= self._left_max:
            raise Unavailable(f"{self._running} looks at files wait for their servers already")
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[T] = loop.create_future()

        def end(set_outcome: Callable[[Any], None], outcome: object) -> None:
            self._running -= 1
            if not ended.done():
                set_outcome(outcome)

        def run() -> None:
            try:
                outcome, set_outcome = work(), ended.set_result
            except BaseException as error:
                outcome, set_outcome = error, ended.set_exception  # type: ignore[assignment]
            with suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(end, set_outcome, outcome)

        self._running += 1
        threading.Thread(target=run, name="blocking call", daemon=True).start()
        async with asyncio.timeout(deadline_s):
            return await ended
