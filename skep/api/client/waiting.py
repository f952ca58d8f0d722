"""Reads for a command that waits.  It continues to wait during a change of leader or a restart of a manager."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

from skep.aio.backoff import Backoff
from skep.errors import Unavailable

T = TypeVar("T")

_FIRST_S: Final = 0.5
"""Seconds before the first repetition.  Electing a new leader takes about a second."""
_LONGEST_S: Final = 5.0
"""Longest pause in seconds.  It is short, because a person waits."""


async def persistently(read: Callable[[], Awaitable[T]], show: Callable[[str], Any]) -> T:
    """Repeat ``read`` while no manager responds, and return its result.  The caller sets the deadline.

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
