"""Questions that are not ours go to other name servers, each over a socket of its own.

A socket of its own means a port that cannot be guessed, beside an id that cannot be guessed; and only the server it is
connected to is read.  Servers that said nothing lately are asked last.

Containers share what the node can ask at a time: when that is used up, one with fewer questions under way than another
takes the place of the other's oldest.  A server that leaves one container's questions unanswered may be slow in one
zone alone; it counts as silent for that container, and for all when several have found it so.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing
from ipaddress import ip_address

import msgspec
import structlog

from skep.aio.clock import Clock
from skep.dataplane.dns.messages import (
    REFUSED,
    SERVFAIL,
    TCP_BYTES_MAX,
    Query,
    code_of,
    forwardable,
    is_answer,
    reply,
)
from skep.errors import SkepError
from skep.linux.descriptors import set_aside

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
SEVERAL = 3
"""Containers whose questions a server left unanswered before it counts as silent for the others."""
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
        self._in_flight: dict[str, dict[asyncio.Timeout, None]] = {}
        """By container, the oldest question first."""
        self._total = 0
        self._silent_until: dict[NameServer, dict[str, float]] = {}
        """By the containers that found them so."""

    @property
    def in_flight(self) -> int:
        return self._total

    def are_silent(self, servers: Sequence[NameServer], container: str) -> bool:
        """Whether none of ``servers`` has answered lately, as far as ``container`` should know."""
        return all(self._is_silent(server, container) for server in servers[:SERVERS_MAX])

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

        A server that fails or refuses is no answer; None: there was no other, or others needed its place more.  With
        too many questions of ``container`` under way, the answer is a refusal.
        """
        if not self._has_place(container):
            return reply(query, REFUSED, bytes_max=query.udp_bytes_max)
        try:
            async with asyncio.timeout(deadline_s) as deadline:
                self._in_flight.setdefault(container, {})[deadline] = None
                self._total += 1
                try:
                    return await self._ask(container, query, data, servers, inside, is_tcp, deadline_s)
                finally:
                    self._leave(container, deadline)
        except TimeoutError:
            return None

    def _has_place(self, container: str) -> bool:
        """Whether ``container`` may ask one more; if need be in the place of who asks most."""
        own = len(self._in_flight.get(container, ()))
        if own >= IN_FLIGHT_PER_CONTAINER_MAX:
            return False
        if self._total < IN_FLIGHT_MAX:
            return True
        most = max(self._in_flight, key=lambda one: len(self._in_flight[one]))
        if own + 1 >= len(self._in_flight[most]):
            return False
        oldest = next(iter(self._in_flight[most]))
        self._leave(most, oldest)
        if not oldest.expired():  # it may be on its way out, and then its time cannot be changed any more
            oldest.reschedule(asyncio.get_running_loop().time())
        return True

    def _leave(self, container: str, deadline: asyncio.Timeout) -> None:
        """Again is harmless."""
        here = self._in_flight.get(container, {})
        if deadline in here:
            del here[deadline]
            self._total -= 1
        if not here:
            self._in_flight.pop(container, None)

    async def _ask(
        self,
        container: str,
        query: Query,
        data: bytes,
        servers: Sequence[NameServer],
        inside: Open,
        is_tcp: bool,
        deadline_s: float,
    ) -> bytes | None:
        ordered = sorted(servers[:SERVERS_MAX], key=lambda server: self._is_silent(server, container))
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
                self._note_silent(server, container)
                continue
            except (OSError, SkepError, ValueError):
                failed.add(server)
                continue
            self._note_heard(server, container)
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

    def _is_silent(self, server: NameServer, container: str) -> bool:
        found, now = self._silent_until.get(server, {}), self._clock.monotonic()
        if found.get(container, 0.0) > now:
            return True
        # One inside is not reached by others on the same way.
        return not server.is_inside and sum(until > now for until in found.values()) >= SEVERAL

    def _note_silent(self, server: NameServer, container: str) -> None:
        if not self._is_silent(server, container):
            log.info("name server does not answer", address=server.address, container=container)
        if len(self._silent_until) >= _KNOWN_SERVERS_MAX:
            self._silent_until.clear()
        now = self._clock.monotonic()
        found = {one: until for one, until in self._silent_until.get(server, {}).items() if until > now}
        self._silent_until[server] = found | {container: now + SILENT_S}

    def _note_heard(self, server: NameServer, container: str) -> None:
        """It is there: for everybody, or by the way of this container."""
        if not server.is_inside:
            self._silent_until.pop(server, None)
        elif (found := self._silent_until.get(server)) is not None:
            found.pop(container, None)


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
