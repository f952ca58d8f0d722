"""Whether the manager process answers at its socket: one that does not is replaced, and before that leads no more."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import structlog

from skep.aio.clock import Clock
from skep.aio.patience import Patience, Step
from skep.errors import SkepError
from skep.paths import Paths

log = structlog.get_logger(__name__)

ASK_S = 1.0
"""Between two questions, and the deadline of each."""
_QUESTION = b"GET /_skep/lag HTTP/1.1\r\nHost: manager\r\nConnection: close\r\n\r\n"

Ask = Callable[[], Awaitable[bool | None]]
HandOver = Callable[[], Awaitable[object]]


async def manager_past_help(
    paths: Paths, hand_over: Callable[[Path], Awaitable[object]], clock: Clock
) -> str:
    """Why the manager process of this node is to be killed.  ``hand_over``: given the socket of its member."""
    return await wait_past_help(
        partial(is_answered, paths.manager_socket), partial(hand_over, paths.etcd_socket), clock
    )


async def wait_past_help(ask: Ask, hand_over: HandOver, clock: Clock) -> str:
    """Ask again and again; return why once it has not answered for too long.

    Args:
        ask: whether there was an answer in time; None: nobody is there to answer yet, which says nothing.
        hand_over: has another manager lead, if this one's member does.
    """
    patience = Patience(2 * ASK_S, clock.monotonic())
    while True:
        await clock.sleep(ASK_S)
        is_answered = await ask()
        match patience.look(clock.monotonic(), is_answered=is_answered is not False):
            case Step.HAND_OVER:
                log.error("the manager process does not answer", silent_s=round(patience.silent_s, 1))
                await _hand_over(hand_over)
            case Step.END:
                return f"it did not answer for {patience.silent_s:.0f} s"


async def _hand_over(hand_over: HandOver) -> None:
    try:
        await hand_over()
    except (SkepError, OSError) as error:
        log.warning("leadership not handed over", reason=str(error))


async def is_answered(socket: Path) -> bool | None:
    """Whether anything comes back from the HTTP server at ``socket``; None: none listens there."""
    try:
        async with asyncio.timeout(ASK_S):
            reader, writer = await asyncio.open_unix_connection(str(socket))
            try:
                writer.write(_QUESTION)
                return bool(await reader.read(1))
            finally:
                writer.close()
    except (FileNotFoundError, ConnectionRefusedError):
        return None
    except (TimeoutError, OSError):
        # OSError: nobody accepts, and the queue of those that wait is full.
        return False
