"""Detects a manager process that does not respond at its socket.

Such a manager first loses its leadership, and is killed later.
"""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import structlog

from skep.aio.clock import Clock, tick
from skep.aio.event_loop.hang_detection import HangAction, HangDetector
from skep.api.http.liveness import REQUEST
from skep.errors import SkepError
from skep.paths import Paths

log = structlog.get_logger(__name__)

POLL_S = 1.0
"""Seconds between requests, and the time limit of each."""
REQUESTS_MAX = 10
"""Limit for the requests on one connection.

A process without free file descriptors accepts no connections but still responds on an old one, so a new connection
must be tried from time to time.
"""

Responds = Callable[[], Awaitable[bool | None]]
HandOver = Callable[[], Awaitable[object]]


async def wait_manager_hung(
    paths: Paths, hand_over: Callable[[Path], Awaitable[object]], clock: Clock
) -> str:
    """Watch this node's manager process, and return why it must be killed.

    ``hand_over`` is called with the socket of its etcd member.
    """
    probe = ManagerProbe(paths.manager_socket)
    try:
        return await wait_hung(probe.responds, partial(hand_over, paths.etcd_socket), clock)
    finally:
        probe.close()


async def wait_hung(responds: Responds, hand_over: HandOver, clock: Clock) -> str:
    """Send requests until cancelled.  Return the reason to kill the process once it has not responded for too long.

    Args:
        responds: Returns whether there was a response in time.  None if nothing listens yet, which counts as a
            response.
        hand_over: Makes another manager the leader if this manager is the leader.
    """
    detector = HangDetector(2 * POLL_S, clock.monotonic())
    attempt: asyncio.Task[None] | None = None
    async with asyncio.TaskGroup() as group:
        while True:
            await tick(clock, POLL_S)
            has_response = await responds()
            match detector.record(clock.monotonic(), has_response=has_response is not False):
                case HangAction.HAND_OVER:
                    log.error("manager process does not respond", silent_s=round(detector.silent_s, 1))
                    # In a task, because a hung member must not delay the end of the process.
                    if attempt is None or attempt.done():
                        attempt = group.create_task(_hand_over(hand_over), name="hand over leadership")
                case HangAction.END:
                    if attempt is not None:
                        attempt.cancel()
                    return f"it did not respond for {detector.silent_s:.0f} s"


async def _hand_over(hand_over: HandOver) -> None:
    try:
        await hand_over()
    except (SkepError, OSError) as error:
        log.warning("leadership not handed over", reason=str(error))


class ManagerProbe:
    """Sends requests to the HTTP server at ``socket``.

    A connection is used for ``REQUESTS_MAX`` requests or until a failure.  A new connection for each request would cost
    a tenth of an idle manager's processor time.
    """

    def __init__(self, socket: Path, within_s: float = POLL_S) -> None:
        """``within_s``: time limit in seconds for a response."""
        self._socket = socket
        self._within_s = within_s
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._requests = 0
        """Number of requests on the open connection so far."""

    async def responds(self) -> bool | None:
        """Return whether the server responds, or None if nothing listens there."""
        try:
            async with asyncio.timeout(self._within_s):
                try:
                    await self._ask()
                except (EOFError, ConnectionError):
                    await (
                        self._ask()
                    )  # once more: the server of the old connection may have ended or closed it
        except (FileNotFoundError, ConnectionRefusedError):
            return None
        except (TimeoutError, OSError, EOFError):
            # OSError: connections are not accepted, and the backlog is full.
            return False
        return True

    async def _ask(self) -> None:
        """Read the head of one response, which has no body."""
        if self._requests >= REQUESTS_MAX:
            self.close()
        try:
            reader, writer = self._streams or await asyncio.open_unix_connection(str(self._socket))
            self._streams = reader, writer
            self._requests += 1
            writer.write(REQUEST)
            await reader.readuntil(b"\r\n\r\n")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None
            self._requests = 0
