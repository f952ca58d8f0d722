"""Asks at ports of the underlay: a manager's, a docker node's gossip, the forwarder of encrypted networks.

Sockets are made in the node's own namespace; each try has a deadline.
"""

import asyncio
import os
import socket
import ssl
from collections.abc import Awaitable, Callable
from functools import cache, partial
from ipaddress import ip_address

from skep.aio.clock import Clock
from skep.dataplane.encrypted.frames import echo_answer, echo_question
from skep.dataplane.netns.namespaces import Namespaces
from skep.dataplane.probe.outcomes import Outcome

TRIES = 2
TRY_S = 2.0
_PAUSE_S = 0.2
_TLS_HANDSHAKE, _TLS_ALERT = 22, 21
_RECORD_BYTES = 5


class Knocking:
    """From one node's ``home`` namespace.  ``numbers``: random, of 64 bits."""

    def __init__(self, namespaces: Namespaces, clock: Clock, numbers: Callable[[], int]) -> None:
        self._namespaces = namespaces
        self._clock = clock
        self._numbers = numbers

    async def hello(self, address: str, port: int) -> Outcome:
        """A TLS hello over TCP, which a server answers with its own."""
        return await self._tried(partial(self._say_hello, address, port))

    async def connect(self, address: str, port: int) -> Outcome:
        """A TCP connection, and nothing more."""
        return await self._tried(partial(self._connect, address, port))

    async def forwarder(self, own: str, address: str, port: int) -> Outcome:
        """An echo of the peer's forwarder, asked from this node's address ``own``, by which it knows who asks."""
        return await self._tried(partial(self._ask_forwarder, own, address, port))

    async def _tried(self, knock: Callable[[], Awaitable[str]]) -> Outcome:
        """Up to ``TRIES`` times until it succeeds; ``knock`` gives what is wrong, empty: nothing."""
        error = ""
        for attempt in range(TRIES):
            began = self._clock.monotonic()
            try:
                async with asyncio.timeout(TRY_S):
                    error = await knock()
            except TimeoutError:
                error = "no answer"
            except OSError as refused:
                # asyncio writes its own sentence over the kernel's.
                error = os.strerror(refused.errno).lower() if refused.errno else str(refused)
            if not error:
                return Outcome(sent=attempt + 1, answered=1, round_trip_s=self._clock.monotonic() - began)
            if attempt < TRIES - 1:
                await self._clock.sleep(_PAUSE_S)
        return Outcome(sent=TRIES, answered=0, error=error)

    async def _connect(self, address: str, port: int) -> str:
        with await self._opened(address, socket.SOCK_STREAM) as opened:
            await asyncio.get_running_loop().sock_connect(opened, (address, port))
        return ""

    async def _say_hello(self, address: str, port: int) -> str:
        loop = asyncio.get_running_loop()
        with await self._opened(address, socket.SOCK_STREAM) as opened:
            await loop.sock_connect(opened, (address, port))
            await loop.sock_sendall(opened, client_hello())
            record = b""
            while len(record) < _RECORD_BYTES:
                part = await loop.sock_recv(opened, _RECORD_BYTES - len(record))
                if not part:
                    return "the connection is closed without an answer"
                record += part
        return "" if record[0] in (_TLS_HANDSHAKE, _TLS_ALERT) else "it does not speak TLS"

    async def _ask_forwarder(self, own: str, address: str, port: int) -> str:
        loop = asyncio.get_running_loop()
        number = self._numbers()
        with await self._opened(address, socket.SOCK_DGRAM) as opened:
            opened.bind((own, 0))
            await loop.sock_connect(opened, (address, port))
            await loop.sock_sendall(opened, echo_question(number))
            while await loop.sock_recv(opened, 1 << 11) != echo_answer(number):
                pass  # another's, or an older one: the deadline ends this
        return ""

    async def _opened(self, address: str, kind: socket.SocketKind) -> socket.socket:
        family = socket.AF_INET6 if ip_address(address).version == 6 else socket.AF_INET
        flags = kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        return await self._namespaces.run(self._namespaces.home, socket.socket, family, flags)


def client_hello() -> bytes:
    """The first bytes of a TLS client that trusts anybody: nothing is told, and nothing believed."""
    outgoing = ssl.MemoryBIO()
    connection = _context().wrap_bio(ssl.MemoryBIO(), outgoing)
    try:
        connection.do_handshake()
    except ssl.SSLWantReadError:
        return outgoing.read()
    raise AssertionError("a client waits for its server's hello")


@cache
def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
