"""Reads for a waiting command, which continues through a change of leader or the restart of a manager."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

from skep.aio.backoff import Backoff
from skep.errors import Unavailable

T = TypeVar("T")

_FIRST_S: Final = 0.5
"""Seconds before the first repetition: a new leader is elected in about a second."""
_LONGEST_S: Final = 5.0
"""Longest pause.  A person waits, so a manager that has returned is found soon."""


async def persistently(read: Callable[[], Awaitable[T]], show: Callable[[str], Any]) -> T:
    """Return the result of ``read``, repeating it while no manager answers.  The caller sets the deadline.

    Use it only after a first read has succeeded, so that a wrong address is an error at once.

    Args:
        show: called with the reason for the wait, whenever the reason changes.
    """
    backoff, shown = Backoff(_FIRST_S, _LONGEST_S), ""
    while True:
        try:
            return await read()
        except (Unavailable, OSError) as error:
            if str(error) != shown:
                shown = str(error)
                show(f"no response, trying again: {shown}")
        await asyncio.sleep(backoff.next_delay_s())
