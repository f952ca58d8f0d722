"""Runs system calls that may never return, such as an access to a file whose server does not respond.

Each call gets its own thread, which is abandoned at the deadline.  In a shared pool, a blocked thread would occupy a
slot and keep the process from ending.
"""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from skep.errors import Unavailable

T = TypeVar("T")


class BlockingCalls:
    """Runs blocking calls.  Refuses new ones while ``left_max`` calls are running, which includes abandoned ones."""

    def __init__(
        self, left_max: int = 64, busy: str = "file accesses already wait for their servers"
    ) -> None:
        """``busy`` describes the running calls in the refusal."""
        self._left_max = left_max
        self._busy = busy
        self._running = 0

    async def call(self, work: Callable[[], T], deadline_s: float) -> T:
        """Run ``work`` in a thread and return its result.

        Raises: TimeoutError: it takes longer than ``deadline_s``, and the thread is abandoned; Unavailable: too many
        calls are running already; any error of ``work``.
        """
        if self._running >= self._left_max:
            raise Unavailable(f"{self._running} {self._busy}")
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
