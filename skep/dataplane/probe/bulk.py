"""TCP inside the probes' VXLAN: whether many bytes arrive at all, and how many in a second.

TCP hands large segments to the device, as containers do: a network card that cuts or checks them wrongly shows here.
The receiver counts, and tells the number when the sender has ended.
"""

import asyncio
import socket
import struct
from collections.abc import Callable

import msgspec

from skep.aio.clock import Clock

BYTES_MAX = 32 << 20
CONNECTIONS_MAX = 32
DEADLINE_S = 3.0
"""For a connection beside the time that it may send."""
SECONDS_MAX = 1.0
_PIECE = bytes(1 << 16)
_COUNT = struct.Struct("!Q")
_TCP_IP_BYTES = 40


class Carried(msgspec.Struct, frozen=True):
    """``bytes`` that the other end says it got, in ``seconds``; 0: none, and they are lost or were refused.

    ``is_lost``: nothing came back in time.  What was refused (the other end is busy, or begins anew) says nothing of
    the way.
    """

    bytes: int = 0
    seconds: float = 0.0
    is_lost: bool = False

    @property
    def per_s(self) -> int:
        """Bytes per second."""
        return int(self.bytes / max(self.seconds, 1e-6))


class Sink(asyncio.Protocol):
    """One connection of a peer, whose bytes are counted and forgotten."""

    def __init__(self, knows: Callable[[str], bool], connections: set["Sink"]) -> None:
        self._knows = knows
        self._connections = connections
        self._transport: asyncio.Transport | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._count = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport), "of TCP"
        self._transport = transport
        address = (transport.get_extra_info("peername") or ("",))[0]
        if not self._knows(address) or len(self._connections) >= CONNECTIONS_MAX:
            transport.abort()
            return
        self._connections.add(self)
        # The sender gives up first, with the reason.
        deadline_s = 2 * (SECONDS_MAX + DEADLINE_S)
        self._deadline = asyncio.get_running_loop().call_later(deadline_s, transport.abort)

    def data_received(self, data: bytes) -> None:
        self._count += len(data)
        if self._count > BYTES_MAX and self._transport is not None:
            self._transport.abort()

    def eof_received(self) -> bool:
        if self._transport is not None:
            self._transport.write(_COUNT.pack(self._count))
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.discard(self)
        if self._deadline is not None:
            self._deadline.cancel()

    def abort(self) -> None:
        """End it at once."""
        if self._transport is not None:
            self._transport.abort()


def connecting(address: str, inner_mtu: int) -> socket.socket:
    """A socket in the calling thread's namespace that connects from ``address`` and sends no larger packets."""
    opened = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, inner_mtu - _TCP_IP_BYTES)
        opened.bind((address, 0))
    except BaseException:
        opened.close()
        raise
    return opened


async def carry(
    opened: socket.socket, target: tuple[str, int], clock: Clock, *, most: int = BYTES_MAX
) -> Carried:
    """Send up to ``most`` bytes, for ``SECONDS_MAX`` at most.  ``opened`` is closed."""
    with opened:
        try:
            async with asyncio.timeout(SECONDS_MAX + DEADLINE_S):
                began = clock.monotonic()
                sent = await _send(opened, target, clock, most)
                counted = await _counted(opened)
        except TimeoutError:
            return Carried(is_lost=True)
        except OSError:
            return Carried()
    return Carried(sent, clock.monotonic() - began) if counted == sent else Carried()


async def _send(opened: socket.socket, target: tuple[str, int], clock: Clock, most: int) -> int:
    loop = asyncio.get_running_loop()
    await loop.sock_connect(opened, target)
    sent, until = 0, clock.monotonic() + SECONDS_MAX
    while sent < most and clock.monotonic() < until:
        piece = _PIECE[: most - sent]
        await loop.sock_sendall(opened, piece)
        sent += len(piece)
    opened.shutdown(socket.SHUT_WR)
    return sent


async def _counted(opened: socket.socket) -> int:
    """What the other end says it got; -1: it says nothing."""
    told = b""
    while len(told) < _COUNT.size:
        part = await asyncio.get_running_loop().sock_recv(opened, _COUNT.size - len(told))
        if not part:
            return -1
        told += part
    (count,) = _COUNT.unpack(told)
    return int(count)
