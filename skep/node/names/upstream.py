"""Questions that are not ours go to other name servers, each over a socket of its own.

A socket of its own means a port that nobody can guess, beside an id that nobody can guess; and only the server it is
connected to is heard.  Servers that said nothing lately are asked last.
"""

import asyncio
import socket
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing
from ipaddress import ip_address

import msgspec
import structlog

from skep.aio.clock import Clock
from skep.errors import SkepError
from skep.linux.descriptors import set_aside
from skep.node.names.messages import (
    REFUSED,
    SERVFAIL,
    TCP_BYTES_MAX,
    Query,
    code_of,
    forwardable,
    is_answer,
    reply,
)

log = structlog.get_logger()

SERVERS_MAX = 3
"""As many are asked.  Source: moby, libnetwork/resolver.go (maxExtDNS)."""
IN_FLIGHT_MAX = 1024
IN_FLIGHT_PER_CONTAINER_MAX = 256
ATTEMPT_S = 1.3
DEADLINE_S = 4.0
"""Of all attempts together: C libraries wait for 5 s before they ask again."""
SILENT_S = 10.0
"""For so long a server that did not answer is believed to be away."""
_KNOWN_SERVERS_MAX = 1000


class NameServer(msgspec.Struct, frozen=True):
    """Another name server.  ``is_inside``: it is reached from the container's own namespace."""

    address: str
    port: int = 53
    is_inside: bool = False


Open = Callable[[socket.SocketKind, socket.AddressFamily], Awaitable[socket.socket]]
"""Opens a socket in a container's namespace.  Raises: OSError."""


class Forwarder:
    """Asks other name servers for all containers of the node.

    ``new_id``: 16 bits that cannot be guessed.
    """

    def __init__(self, clock: Clock, new_id: Callable[[], int]) -> None:
        self._clock = clock
        self._new_id = new_id
        self._in_flight: Counter[str] = Counter()
        self._silent_until: dict[NameServer, float] = {}

    @property
    def in_flight(self) -> int:
        return self._in_flight.total()

    def are_silent(self, servers: Sequence[NameServer]) -> bool:
        """Whether none of ``servers`` has answered lately, though all were asked."""
        return all(map(self._is_silent, servers[:SERVERS_MAX]))

    async def ask(
        self,
        container: str,
        query: Query,
        data: bytes,
        servers: Sequence[NameServer],
        *,
        inside: Open,
        is_tcp: bool,
        deadline_s: float = DEADLINE_S,
    ) -> bytes | None:
        """What the first of ``servers`` that knows says to ``query``, whose message is ``data``.

        A server that fails or refuses is no answer; None: there was no other.  With too many questions under way,
        the answer is a refusal.
        """
        if self.in_flight >= IN_FLIGHT_MAX or self._in_flight[container] >= IN_FLIGHT_PER_CONTAINER_MAX:
            return reply(query, REFUSED, bytes_max=query.udp_bytes_max)
        self._in_flight[container] += 1
        try:
            async with asyncio.timeout(deadline_s):
                return await self._ask(query, data, servers, inside, is_tcp, deadline_s)
        except TimeoutError:
            return None
        finally:
            self._in_flight[container] -= 1
            if not self._in_flight[container]:
                del self._in_flight[container]

    async def _ask(
        self,
        query: Query,
        data: bytes,
        servers: Sequence[NameServer],
        inside: Open,
        is_tcp: bool,
        deadline_s: float,
    ) -> bytes | None:
        ordered = sorted(servers[:SERVERS_MAX], key=self._is_silent)
        again = ordered if len(ordered) < SERVERS_MAX else []  # a packet may be lost on the way
        # With time left for each, so that it is known who was silent.
        attempt_s = min(ATTEMPT_S, deadline_s / (1.25 * max(len(ordered), 1)))
        failed: set[NameServer] = set()
        for server in (*ordered, *again):
            if server in failed:
                continue
            try:
                async with asyncio.timeout(attempt_s):
                    answer = await self._exchange(query, data, server, inside, is_tcp)
            except TimeoutError:
                self._note_silent(server)
                continue
            except (OSError, SkepError, ValueError):
                failed.add(server)
                continue
            self._silent_until.pop(server, None)
            if code_of(answer) not in (SERVFAIL, REFUSED):
                return answer
            failed.add(server)
        return None

    async def _exchange(
        self, query: Query, data: bytes, server: NameServer, inside: Open, is_tcp: bool
    ) -> bytes:
        family = socket.AF_INET6 if ip_address(server.address).version == 6 else socket.AF_INET
        kind = socket.SOCK_STREAM if is_tcp else socket.SOCK_DGRAM
        opened = await inside(kind, family) if server.is_inside else socket.socket(family, kind)
        with closing(set_aside(opened)) as opened:
            opened.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(opened, (server.address, server.port))
            id = self._new_id()
            message = forwardable(data, id)
            if is_tcp:
                await loop.sock_sendall(opened, len(message).to_bytes(2, "big") + message)
                answer = await read_message(opened)
                if not is_answer(answer, id, query.question):
                    raise ConnectionError("the answer is to another question")
                return answer
            await loop.sock_sendall(opened, message)
            while True:
                answer = await loop.sock_recv(opened, TCP_BYTES_MAX)
                if is_answer(answer, id, query.question):
                    return answer

    def _is_silent(self, server: NameServer) -> bool:
        return self._silent_until.get(server, 0.0) > self._clock.monotonic()

    def _note_silent(self, server: NameServer) -> None:
        if not self._is_silent(server):
            log.info("name server does not answer", address=server.address)
        if len(self._silent_until) >= _KNOWN_SERVERS_MAX:
            self._silent_until.clear()
        self._silent_until[server] = self._clock.monotonic() + SILENT_S


async def read_message(connection: socket.socket) -> bytes:
    """The next message of a TCP connection.  Raises: ConnectionError: it ends."""
    length = int.from_bytes(await _exactly(connection, 2), "big")
    return await _exactly(connection, length)


async def _exactly(connection: socket.socket, count: int) -> bytes:
    loop = asyncio.get_running_loop()
    data = b""
    while len(data) < count:
        piece = await loop.sock_recv(connection, count - len(data))
        if not piece:
            raise ConnectionResetError("closed by the other end")
        data += piece
    return data
