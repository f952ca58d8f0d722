"""TLS handshakes of incoming connections, bounded in number and time.

asyncio does not bound their number: 10,000 connections that send nothing would take a gigabyte.
"""

import asyncio
import socket
import ssl
from collections.abc import Callable

import structlog

from skep.aio.admission import Newcomers, source_of
from skep.aio.failures import log_error
from skep.aio.tls import accept

log = structlog.get_logger(__name__)

HANDSHAKE_SECONDS_MAX = 10.0
HANDSHAKES_MAX = 256
"""At one time.  When there are more, the oldest one of the address with most of them is ended: a normal handshake
takes milliseconds."""
ACCEPT_RETRY_S = 0.1


class Handshakes:
    """Handshakes of one listener.  ``new_protocol`` makes the protocol of a connection whose handshake is done."""

    def __init__(self, new_protocol: Callable[[], asyncio.BaseProtocol], tls: ssl.SSLContext) -> None:
        self._new_protocol = new_protocol
        self._tls = tls
        self._under_way: Newcomers[asyncio.Task[None]] = Newcomers(
            "handshakes", HANDSHAKES_MAX, HANDSHAKES_MAX, lambda task: task.cancel()
        )

    @property
    def count(self) -> int:
        """Under way."""
        return len(self._under_way)

    def give_up(self) -> None:
        """End all that are under way."""
        for task in self._under_way:
            task.cancel()

    async def accept(self, listener: socket.socket, group: asyncio.TaskGroup) -> None:
        """Accept connections until cancelled.  ``listener``: non-blocking."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    connection, address = await loop.sock_accept(listener)
                except OSError as error:  # out of descriptors, or the peer has gone already
                    log.warning("connection not accepted", error=str(error))
                    await asyncio.sleep(ACCEPT_RETRY_S)
                    continue
                self._begin(
                    group.create_task(self._shake_hands(connection), name="handshake"),
                    source_of(str(address[0])),
                )
                await asyncio.sleep(0)  # lets the handshake begin: it owns the socket from then on
        finally:
            self.give_up()

    def _begin(self, task: asyncio.Task[None], source: str) -> None:
        self._under_way.admit(task, source)
        task.add_done_callback(self._under_way.forget)

    async def _shake_hands(self, connection: socket.socket) -> None:
        try:
            await accept(self._new_protocol, connection, self._tls, handshake_s=HANDSHAKE_SECONDS_MAX)
        except OSError as error:  # TLS errors and lost peers are some
            log.debug("handshake failed", error=str(error) or type(error).__name__)
        except Exception as error:  # of this peer alone
            log_error(error, "handshake failed")
