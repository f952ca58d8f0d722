"""TCP transfers inside the probes' VXLAN, to test whether bulk data arrives, and how much of it in a second.

TCP passes large segments to the device, as containers' connections do, which finds network cards with faulty
segmentation or checksums.  When the sender has finished, the receiver sends the number of bytes that it has received.
"""

import asyncio
import socket
import struct
from collections.abc import Callable

import msgspec

from skep.aio.clock import Clock

BYTES_MAX = 32 << 20
"""Limit in bytes for one measurement.  A fast network reaches it before ``SECONDS_MAX``."""
CONNECTIONS_MAX = 32
"""Limit for the measurements that one node answers at a time."""
DEADLINE_S = 3.0
"""Time limit in seconds for connecting and for the receiver's count, in addition to the time of sending."""
SECONDS_MAX = 1.0
"""Limit in seconds for the sending in one measurement."""
_CHUNK = bytes(1 << 16)
_COUNT = struct.Struct("!Q")
_TCP_IP_BYTES = 40
"""Length of the IPv4 and TCP headers without options."""


class Transfer(msgspec.Struct, frozen=True):
    """The ``bytes`` that the receiver has confirmed, in ``seconds``.  0 if the data was lost or the connection refused.

    ``is_lost`` is True if no confirmation arrived in time.  A refused connection is not evidence of a faulty path,
    because the receiver may be busy or restarting.
    """

    bytes: int = 0
    seconds: float = 0.0
    is_lost: bool = False

    @property
    def per_s(self) -> int:
        """Bytes per second."""
        return int(self.bytes / max(self.seconds, 1e-6))


class Sink(asyncio.Protocol):
    """The receiving end of a peer's connection.  Counts and discards the bytes."""

    def __init__(self, is_peer: Callable[[str], bool], connections: set["Sink"]) -> None:
        self._is_peer = is_peer
        self._connections = connections
        self._transport: asyncio.Transport | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._count = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Refuse the connection unless it is from a peer and fewer than the maximum are open."""
        assert isinstance(transport, asyncio.Transport), "of TCP"
        self._transport = transport
        address = (transport.get_extra_info("peername") or ("",))[0]
        if not self._is_peer(address) or len(self._connections) >= CONNECTIONS_MAX:
            transport.abort()
            return
        self._connections.add(self)
        # Longer than the sender's own limit, so that the sender ends first and knows the reason.
        deadline_s = 2 * (SECONDS_MAX + DEADLINE_S)
        self._deadline = asyncio.get_running_loop().call_later(deadline_s, transport.abort)

    def data_received(self, data: bytes) -> None:
        """Count ``data``.  Aborts the connection above the limit of a transfer."""
        self._count += len(data)
        if self._count > BYTES_MAX and self._transport is not None:
            self._transport.abort()

    def eof_received(self) -> bool:
        """Send the count and close."""
        if self._transport is not None:
            self._transport.write(_COUNT.pack(self._count))
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Allow another connection."""
        self._connections.discard(self)
        if self._deadline is not None:
            self._deadline.cancel()

    def abort(self) -> None:
        """Close the connection at once."""
        if self._transport is not None:
            self._transport.abort()


def open_sender(address: str, inner_mtu: int) -> socket.socket:
    """Open a socket in the calling thread's namespace, bound to ``address``.

    Its packets do not exceed ``inner_mtu``.
    """
    sender = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, inner_mtu - _TCP_IP_BYTES)
        sender.bind((address, 0))
    except BaseException:
        sender.close()
        raise
    return sender


async def transfer(
    sender: socket.socket, target: tuple[str, int], clock: Clock, *, most: int = BYTES_MAX
) -> Transfer:
    """Send up to ``most`` bytes, for ``SECONDS_MAX`` at most.  Closes ``sender``."""
    with sender:
        try:
            async with asyncio.timeout(SECONDS_MAX + DEADLINE_S):
                began = clock.monotonic()
                sent = await _send(sender, target, clock, most)
                received = await _received_count(sender)
        except TimeoutError:
            return Transfer(is_lost=True)
        except OSError:
            return Transfer()
    return Transfer(sent, clock.monotonic() - began) if received == sent else Transfer()


async def _send(sender: socket.socket, target: tuple[str, int], clock: Clock, most: int) -> int:
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sender, target)
    sent, until = 0, clock.monotonic() + SECONDS_MAX
    while sent < most and clock.monotonic() < until:
        chunk = _CHUNK[: most - sent]
        await loop.sock_sendall(sender, chunk)
        sent += len(chunk)
    sender.shutdown(socket.SHUT_WR)
    return sent


async def _received_count(sender: socket.socket) -> int:
    """Return the number of bytes that the receiver confirms, or -1 if it closed without confirmation."""
    data = b""
    while len(data) < _COUNT.size:
        part = await asyncio.get_running_loop().sock_recv(sender, _COUNT.size - len(data))
        if not part:
            return -1
        data += part
    (count,) = _COUNT.unpack(data)
    return int(count)
