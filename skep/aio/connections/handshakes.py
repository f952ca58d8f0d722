"""TLS handshakes of incoming connections, with limits on number and time.

asyncio does not limit their number: 10,000 connections that send nothing would take a gigabyte.
"""

import asyncio
import socket
import ssl
from collections.abc import Callable

import structlog

from skep.aio.connections.admission import Newcomers, source_of
from skep.aio.connections.tls import accept
from skep.aio.failures import log_error

log = structlog.get_logger(__name__)

HANDSHAKE_SECONDS_MAX = 10.0
"""Deadline of one handshake, which normally takes milliseconds."""
HANDSHAKES_MAX = 256
"""Largest number of concurrent handshakes.  Beyond it, the address with most handshakes loses its oldest one, which has
already taken longer than a normal handshake.
"""
ACCEPT_RETRY_S = 0.1
"""Seconds to wait after a failed accept.  Without free file descriptors, it would fail again immediately."""


class Handshakes:
    """Handshakes of one listener.  ``new_protocol`` creates the protocol of a connection after its handshake."""

    def __init__(
        self,
        new_protocol: Callable[[], asyncio.BaseProtocol],
        tls: ssl.SSLContext,
        handshakes_max: int = HANDSHAKES_MAX,
    ) -> None:
        self._new_protocol = new_protocol
        self._tls = tls
        self._under_way: Newcomers[asyncio.Task[None]] = Newcomers(
            "handshakes", handshakes_max, handshakes_max, lambda task: task.cancel()
        )

    @property
    def count(self) -> int:
        """Number of handshakes in progress."""
        return len(self._under_way)

    def give_up(self) -> None:
        """Cancel all handshakes in progress."""
        for task in self._under_way:
            task.cancel()

    async def accept(self, listener: socket.socket, group: asyncio.TaskGroup) -> None:
        """Accept connections until cancelled.  ``listener`` is non-blocking."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    connection, address = await loop.sock_accept(listener)
                except OSError as error:  # out of descriptors, or the peer has disconnected already
                    log.warning("connection not accepted", error=str(error))
                    await asyncio.sleep(ACCEPT_RETRY_S)
                    continue
                self._begin(
                    group.create_task(self._shake_hands(connection), name="handshake"),
                    source_of(str(address[0])),
                )
                await asyncio.sleep(0)  # lets the handshake start, which then closes the socket itself
        finally:
            self.give_up()

    def _begin(self, task: asyncio.Task[None], source: str) -> None:
        self._under_way.admit(task, source)
        task.add_done_callback(self._under_way.forget)

    async def _shake_hands(self, connection: socket.socket) -> None:
        try:
            await accept(self._new_protocol, connection, self._tls, handshake_s=HANDSHAKE_SECONDS_MAX)
        except OSError as error:  # includes TLS errors and lost peers
            log.debug("handshake failed", error=str(error) or type(error).__name__)
        except Exception as error:  # must not affect other peers
            log_error(error, "handshake failed")
