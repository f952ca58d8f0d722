"""TLS handshakes of incoming connections, bounded in number and time.

asyncio does not bound their number: 10,000 connections that send nothing would take a gigabyte.
"""

import asyncio
import socket
import ssl
from collections import Counter
from collections.abc import Callable
from ipaddress import ip_address

import structlog

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
        self._is_flooded = False
        self._under_way: dict[asyncio.Task[None], str] = {}
        """Oldest first, each with its source."""

    @property
    def count(self) -> int:
        """Under way."""
        return len(self._under_way)

    def give_up(self) -> None:
        """End all that are under way."""
        for task in tuple(self._under_way):
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
        """A connection was accepted; when there are too many, one of the address with most of them makes room."""
        if len(self._under_way) >= HANDSHAKES_MAX:
            ((greediest, _),) = Counter(self._under_way.values()).most_common(1)
            oldest = next(one for one, source in self._under_way.items() if source == greediest)
            del self._under_way[oldest]
            oldest.cancel()
            if not self._is_flooded:
                log.warning("too many handshakes at one time", most=HANDSHAKES_MAX, most_from=greediest)
            self._is_flooded = True
        self._under_way[task] = source
        task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[None]) -> None:
        self._under_way.pop(task, None)
        self._is_flooded = self._is_flooded and bool(self._under_way)

    async def _shake_hands(self, connection: socket.socket) -> None:
        try:
            await accept(self._new_protocol, connection, self._tls, handshake_s=HANDSHAKE_SECONDS_MAX)
        except OSError as error:  # TLS errors and lost peers are some
            log.debug("handshake failed", error=str(error) or type(error).__name__)
        except Exception as error:  # of this peer alone
            log_error(error, "handshake failed")


def source_of(address: str) -> str:
    """The source by which connections are counted: an IPv4 address, or the first 64 bits of an IPv6 one."""
    if ":" not in address:
        return address
    try:
        packed = ip_address(address.partition("%")[0]).packed
    except ValueError:
        return address
    return packed[:8].hex()
