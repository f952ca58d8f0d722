"""Reads of a command that waits: it goes on over a change of leader and a manager that restarts."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

from skep.aio.backoff import Backoff
from skep.errors import Unavailable

T = TypeVar("T")

_FIRST_S: Final = 0.5
_LONGEST_S: Final = 5.0


async def persistently(read: Callable[[], Awaitable[T]], show: Callable[[str], Any]) -> T:
    """The result of ``read``, which is called again for as long as nothing answers; the caller has a deadline.

    For reads after a first one that was answered: a wrong address is an error at once.

    Args:
        show: gets the reason, once for each.
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
