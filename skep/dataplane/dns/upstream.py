"""Forwards queries for names outside the container's networks to other name servers, each query over a new socket.

A new socket has a random port, in addition to the query's random id, and receives only from the connected server.  This
makes forged responses unlikely.  Servers that did not respond lately are tried last.

The node has a limit for queries in flight.  At the limit, a query of a container with few queries in flight displaces
the oldest query of the container with most.  A server that does not respond to one container may be slow for one zone
only, so it first counts as unresponsive only for that container.  When several containers have found it unresponsive,
it counts so for all.
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
from skep.model.networks.dns_messages import (
    AAAA,
    FORMERR,
    MX,
    NOERROR,
    NOTIMP,
    NXDOMAIN,
    PTR,
    REFUSED,
    SERVFAIL,
    SRV,
    TCP_BYTES_MAX,
    A,
    Query,
    forwardable,
    is_response,
    reply,
    response_code,
)

log = structlog.get_logger()

SERVERS_MAX = 3
"""Number of servers that are tried.  Source: moby, libnetwork/resolver.go (maxExtDNS)."""
DEADLINE_S = 4.0
"""Time limit in seconds for all attempts together.  C libraries repeat a query after 5 s."""
UNRESPONSIVE_S = 10.0
"""Seconds for which a server that did not respond is tried last."""
CONTAINERS_MIN = 3
"""Number of containers to which a server did not respond before it counts as unresponsive for the others."""
_KNOWN_SERVERS_MAX = 1000
"""Limit for the servers that are remembered as unresponsive.  Needed because containers may name any server."""


class UpstreamServer(msgspec.Struct, frozen=True):
    """Another name server.  If ``is_inside``, it is reached from the container's own namespace."""

    address: str
    port: int = 53
    is_inside: bool = False


Open = Callable[[socket.SocketKind, socket.AddressFamily], Awaitable[socket.socket]]
"""Opens a socket in a container's namespace.  Raises: OSError."""


class ForwardedQuery(msgspec.Struct, frozen=True):
    """A query of ``container`` that is forwarded.  ``data`` is its DNS message."""

    container: str
    query: Query
    data: bytes
    inside: Open
    is_tcp: bool


class ForwardingLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of forwarded queries."""

    in_flight: int = 1024
    """Limit for queries in flight on this node.  Source: moby, libnetwork/resolver.go (maxConcurrent)."""
    in_flight_per_container: int = 256
    """Limit for queries in flight of one container, so that a flood of its queries leaves room for others."""
    attempt_s: float = 1.3
    """Time limit in seconds for one server, so that three attempts end before ``DEADLINE_S``."""


LIMITS = ForwardingLimits()


class QueryForwarder:
    """Forwards queries of all containers of the node.

    ``new_id`` returns 16 random bits.
    """

    def __init__(self, clock: Clock, new_id: Callable[[], int], limits: ForwardingLimits = LIMITS) -> None:
        self._clock = clock
        self._limits = limits
        self._new_id = new_id
        self.counts = DnsCounts()
        self.in_flight_requests: dict[str, dict[asyncio.Timeout, None]] = {}
        """The deadline of each query in flight, by container, the oldest query first."""
        self._total = 0
        self._unresponsive_until: dict[UpstreamServer, dict[str, float]] = {}
        """The time until which a server is tried last, by server and by the container to which it did not respond."""

    @property
    def in_flight(self) -> int:
        """Number of queries, of all containers, that currently wait for other servers."""
        return self._total

    def are_unresponsive(self, servers: Sequence[UpstreamServer], container: str) -> bool:
        """Return whether none of ``servers`` has responded to ``container`` lately."""
        return all(self._is_unresponsive(server, container) for server in servers[:SERVERS_MAX])

    async def forward(
        self, one: ForwardedQuery, servers: Sequence[UpstreamServer], deadline_s: float = DEADLINE_S
    ) -> bytes | None:
        """Return the first response of ``servers`` that is not an error, in their order.

        Returns None if there was no such response, or the query was displaced.  If its container has too many queries
        in flight, returns the response REFUSED.
        """
        container = one.container
        if not self._has_room(container):
            return reply(one.query, REFUSED, bytes_max=one.query.udp_bytes_max)
        try:
            async with asyncio.timeout(deadline_s) as deadline:
                self.in_flight_requests.setdefault(container, {})[deadline] = None
                self._total += 1
                try:
                    return await self._try_servers(one, servers, deadline_s)
                finally:
                    self._leave(container, deadline)
        except TimeoutError:
            return None

    def _has_room(self, container: str) -> bool:
        """Return whether ``container`` may send one more query.

        If needed, displaces a query of the container with most queries in flight.
        """
        own = len(self.in_flight_requests.get(container, ()))
        if own >= self._limits.in_flight_per_container:
            return False
        if self._total < self._limits.in_flight:
            return True
        most = max(self.in_flight_requests, key=lambda one: len(self.in_flight_requests[one]))
        if own + 1 >= len(self.in_flight_requests[most]):
            return False
        oldest = next(iter(self.in_flight_requests[most]))
        self._leave(most, oldest)
        if not oldest.expired():  # an expired deadline cannot be rescheduled
            oldest.reschedule(asyncio.get_running_loop().time())
        return True

    def _leave(self, container: str, deadline: asyncio.Timeout) -> None:
        """Remove a query in flight.  Idempotent."""
        here = self.in_flight_requests.get(container, {})
        if deadline in here:
            del here[deadline]
            self._total -= 1
        if not here:
            self.in_flight_requests.pop(container, None)

    async def _try_servers(
        self, one: ForwardedQuery, servers: Sequence[UpstreamServer], deadline_s: float
    ) -> bytes | None:
        container = one.container
        ordered = sorted(servers[:SERVERS_MAX], key=lambda server: self._is_unresponsive(server, container))
        again = ordered if len(ordered) < SERVERS_MAX else []  # try again once, because a packet may be lost
        # Leave time for every attempt, so that each unresponsive server becomes known.
        attempt_s = min(self._limits.attempt_s, deadline_s / (1.25 * max(len(ordered), 1)))
        failed: set[UpstreamServer] = set()
        for server in (*ordered, *again):
            if server in failed:
                continue
            try:
                async with asyncio.timeout(attempt_s):
                    response = await self._exchange(one, server)
            except TimeoutError:
                self.counts.upstream_timeouts += 1
                self._mark_unresponsive(server, container)
                continue
            except (OSError, SkepError, ValueError):
                self.counts.upstream_failures += 1
                failed.add(server)
                continue
            self._mark_responsive(server, container)
            if response_code(response) not in (SERVFAIL, REFUSED):
                return response
            self.counts.upstream_failures += 1
            failed.add(server)
        return None

    async def _exchange(self, one: ForwardedQuery, server: UpstreamServer) -> bytes:
        family = socket.AF_INET6 if ip_address(server.address).version == 6 else socket.AF_INET
        kind = socket.SOCK_STREAM if one.is_tcp else socket.SOCK_DGRAM
        opened = await one.inside(kind, family) if server.is_inside else socket.socket(family, kind)
        with closing(set_aside(opened)) as opened:
            opened.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(opened, (server.address, server.port))
            id = self._new_id()
            message = forwardable(one.data, id)
            if one.is_tcp:
                await loop.sock_sendall(opened, len(message).to_bytes(2, "big") + message)
                response = await read_message(opened)
                if not is_response(response, id, one.query.question):
                    raise ConnectionError("the response is to another query")
                return response
            await loop.sock_sendall(opened, message)
            while True:
                response = await loop.sock_recv(opened, TCP_BYTES_MAX)
                if is_response(response, id, one.query.question):
                    return response

    def _is_unresponsive(self, server: UpstreamServer, container: str) -> bool:
        found, now = self._unresponsive_until.get(server, {}), self._clock.monotonic()
        if found.get(container, 0.0) > now:
            return True
        # A server inside a container's network may be a different one for other containers.
        return not server.is_inside and sum(until > now for until in found.values()) >= CONTAINERS_MIN

    def _mark_unresponsive(self, server: UpstreamServer, container: str) -> None:
        if not self._is_unresponsive(server, container):
            log.info("name server does not respond", address=server.address, container=container)
        if len(self._unresponsive_until) >= _KNOWN_SERVERS_MAX:
            self._unresponsive_until.clear()
        now = self._clock.monotonic()
        found = {one: until for one, until in self._unresponsive_until.get(server, {}).items() if until > now}
        self._unresponsive_until[server] = found | {container: now + UNRESPONSIVE_S}

    def _mark_responsive(self, server: UpstreamServer, container: str) -> None:
        """Record that the server responds.

        This counts for all containers, or only for ``container`` if the server is inside a network.
        """
        if not server.is_inside:
            self._unresponsive_until.pop(server, None)
        elif (found := self._unresponsive_until.get(server)) is not None:
            found.pop(container, None)


async def read_message(connection: socket.socket) -> bytes:
    """Return the next message of a TCP connection.  Raises: ConnectionError: the connection has ended."""
    length = int.from_bytes(await _exactly(connection, 2), "big")
    return await _exactly(connection, length)


async def _exactly(connection: socket.socket, count: int) -> bytes:
    loop = asyncio.get_running_loop()
    data = b""
    while len(data) < count:
        chunk = await loop.sock_recv(connection, count - len(data))
        if not chunk:
            raise ConnectionResetError("closed by the other end")
        data += chunk
    return data


_TYPES = {A: "A", AAAA: "AAAA", PTR: "PTR", SRV: "SRV", MX: "MX"}
_CODES = {
    NOERROR: "NOERROR",
    FORMERR: "FORMERR",
    SERVFAIL: "SERVFAIL",
    NXDOMAIN: "NXDOMAIN",
    NOTIMP: "NOTIMP",
    REFUSED: "REFUSED",
}


class DnsCounts:
    """Number of ``questions`` by type, and of ``responses`` by source and code.

    The source of a response is ``network``, ``forwarded``, or ``none`` for a malformed query.
    """

    def __init__(self) -> None:
        self.questions: Counter[str] = Counter()
        self.responses: Counter[tuple[str, str]] = Counter()
        self.upstream_timeouts = 0
        self.upstream_failures = 0
        """Number of failed connections to other servers and of their error responses."""

    def question(self, type: int) -> None:
        """Count a query."""
        # count unknown types together: clients can ask for any number, and metrics must not grow without a limit
        self.questions[_TYPES.get(type, "other")] += 1

    def response(self, source: str, message: bytes) -> None:
        """Count the response ``message``, which has been sent."""
        self.responses[source, _CODES.get(response_code(message), "other")] += 1
