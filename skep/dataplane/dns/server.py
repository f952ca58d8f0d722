"""The name server of one container: a UDP and a TCP socket in its namespace.

A query is answered at once if possible.  A query that has to wait for rules or for another name server becomes a task.
Each container has a limited number of tasks.
"""

import asyncio
import errno
import socket
from collections.abc import Awaitable, Callable
from typing import Protocol

import msgspec
import structlog

from skep.dataplane.dns.redirection import ADDRESS
from skep.dataplane.dns.resolution import TTL_S, Decision, Foreign, FoundName, Missing
from skep.dataplane.dns.upstream import (
    DEADLINE_S,
    ForwardedQuery,
    Open,
    QueryForwarder,
    UpstreamServer,
    read_message,
)
from skep.errors import SkepError
from skep.linux.descriptors import set_aside
from skep.model.networks.dns_messages import (
    AAAA,
    NOERROR,
    NXDOMAIN,
    QUERY_BYTES_MAX,
    REFUSED,
    SERVFAIL,
    TCP_BYTES_MAX,
    A,
    Query,
    fitting,
    parse,
    reply,
)
from skep.model.values.ids import NetworkId, ServiceId

log = structlog.get_logger()

PENDING_MAX = 256
"""Limit for the pending forwarded queries of one container.  Further ones are refused.

The limit for all pending queries is twice as high, so that a container with too many forwarded queries still resolves
services.
"""
CONNECTIONS_MAX = 64
"""Limit for the TCP connections of one container.  Further ones are closed at once."""
IDLE_S = 10.0
"""Seconds without a query after which a TCP connection is closed."""
SINGLE_LABEL_S = 1.0
"""Time limit in seconds for forwarding a single-label name.  Short, because such names are not in the public DNS."""
_BURST = 32
"""Number of datagrams of one container that are read in a row before other work of the event loop."""
_BACKLOG = 128
"""TCP connections that the kernel queues.  Twice ``CONNECTIONS_MAX``, because a container cannot keep more."""
ACCEPT_PAUSE_S = 0.1
"""Seconds to pause after accept failed for lack of descriptors.

The socket stays readable, so an immediate retry would be a busy loop.
"""

PendingQuery = tuple[str, int, bytes]
"""A pending query: the client's address and port, and the message."""
Services = frozenset[tuple[NetworkId, ServiceId]]


class DnsSockets(msgspec.Struct, frozen=True):
    """The sockets of a container's name server."""

    udp: socket.socket
    tcp: socket.socket

    @property
    def ports(self) -> tuple[int, int]:
        """The ports of the UDP and the TCP socket."""
        return self.udp.getsockname()[1], self.tcp.getsockname()[1]

    def close(self) -> None:
        """Close both sockets."""
        self.udp.close()
        self.tcp.close()


class Resolver(Protocol):
    """Resolves names for one container."""

    def resolve(self, query: Query) -> Decision:
        """Decide how to respond to ``query``."""

    def is_loaded(self, services: Services) -> bool:
        """Return whether the rules for the virtual addresses of ``services`` are in the container's namespace."""

    async def load(self, services: Services) -> None:
        """Write the rules of these services.  Raises: SkepError."""


class Forwarding(msgspec.Struct, frozen=True):
    """Forwarding of names outside the container's networks.

    ``does_single_labels`` is False if single-label names get an empty response instead, so that the client tries its
    search domains (as ``ndots`` demands).
    """

    servers: tuple[UpstreamServer, ...]
    inside: Open
    does_single_labels: bool = True


def open_sockets(udp_port: int, tcp_port: int) -> DnsSockets:
    """Open the sockets in the calling thread's namespace.  If a port is 0 or in use, a free port is chosen.

    Raises: OSError.
    """
    udp = _bound(socket.SOCK_DGRAM, udp_port)
    try:
        tcp = _bound(socket.SOCK_STREAM, tcp_port)
        tcp.listen(_BACKLOG)
    except BaseException:
        udp.close()
        raise
    return DnsSockets(udp, tcp)


class ContainerServer:
    """Serves one container from ``start`` to ``stop``.

    ``start_task`` starts a supervised task.
    """

    def __init__(
        self,
        container: str,
        sockets: DnsSockets,
        resolver: Resolver,
        forwarder: QueryForwarder,
        forwarding: Forwarding,
        start_task: Callable[[Awaitable[None]], asyncio.Task[None]],
    ) -> None:
        self.sockets = sockets
        self.forwarding = forwarding
        self._container = container
        self._resolver = resolver
        self._forwarder = forwarder
        self._start_task = start_task
        self._pending: dict[asyncio.Task[None], PendingQuery] = {}
        self._connections: set[asyncio.Task[None]] = set()
        self._is_running = False
        self._resuming: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Start to serve."""
        loop = asyncio.get_running_loop()
        for one in (self.sockets.udp, self.sockets.tcp):
            one.setblocking(False)
        self._is_running = True
        loop.add_reader(self.sockets.udp, self._read)
        loop.add_reader(self.sockets.tcp, self._accept)

    def stop(self) -> tuple[PendingQuery, ...]:
        """Stop reading and return the pending queries for another server.  The sockets stay open."""
        if not self._is_running:
            return ()
        self._is_running = False
        loop = asyncio.get_running_loop()
        loop.remove_reader(self.sockets.udp)
        loop.remove_reader(self.sockets.tcp)
        if self._resuming is not None:
            self._resuming.cancel()
            self._resuming = None
        pending = tuple(one for task, one in self._pending.items() if not task.done())
        for task in (*self._pending, *self._connections):
            task.cancel()
        return pending

    def received(self, data: bytes, client: tuple[str, int]) -> None:
        """Respond to the datagram ``data`` from ``client``, at once or later."""
        query = parse(data)
        if query is None:
            return
        if isinstance(query, bytes):
            self._send(self._counted(None, query), client)
            return
        self._forwarder.counts.question(query.type)
        decision = self._resolver.resolve(query)
        response = self._immediate(query, decision, query.udp_bytes_max)
        most = PENDING_MAX if isinstance(decision, Foreign) else 2 * PENDING_MAX
        if response is None and len(self._pending) >= most:
            response = reply(query, REFUSED, bytes_max=query.udp_bytes_max)
        if response is not None:
            self._send(self._counted(decision, response), client)
            return
        task = self._start_task(self._respond_later(query, data, decision, client))
        self._pending[task] = (*client, data)
        task.add_done_callback(lambda done: self._pending.pop(done, None))

    def _read(self) -> None:
        for _ in range(_BURST):
            try:
                data, client = self.sockets.udp.recvfrom(QUERY_BYTES_MAX + 1)
            except OSError:
                return  # nothing more to read, or an error that another read would not fix
            self.received(data, client)

    def _send(self, response: bytes, client: tuple[str, int]) -> None:
        try:
            self.sockets.udp.sendto(response, client)
        except OSError:
            return  # the buffer is full, or the address forged; clients repeat their queries

    async def _respond_later(
        self, query: Query, data: bytes, decision: Decision, client: tuple[str, int]
    ) -> None:
        response = await self._wait_for_response(query, data, decision, query.udp_bytes_max, is_tcp=False)
        self._send(self._counted(decision, response), client)

    def _counted(self, decision: Decision | None, response: bytes) -> bytes:
        """Count and return ``response``.  ``decision`` is None for a malformed query."""
        source = "none" if decision is None else "forwarded" if isinstance(decision, Foreign) else "network"
        self._forwarder.counts.response(source, response)
        return response

    def _immediate(self, query: Query, decision: Decision, bytes_max: int) -> bytes | None:
        """Return the response to ``query``, or None if it has to wait."""
        match decision:
            case FoundName(answers, extra, virtual):
                if not self._resolver.is_loaded(virtual):
                    return None
                return reply(query, NOERROR, answers, extra, ttl_s=TTL_S, bytes_max=bytes_max)
            case Missing():
                return reply(query, NXDOMAIN, bytes_max=bytes_max)
            case Foreign(is_single_label):
                if is_single_label:
                    if not self.forwarding.does_single_labels and query.type in (A, AAAA):
                        return reply(query, NOERROR, bytes_max=bytes_max)
                    if self._forwarder.are_unresponsive(self.forwarding.servers, self._container):
                        return reply(query, NXDOMAIN, bytes_max=bytes_max)
                return None if self.forwarding.servers else reply(query, SERVFAIL, bytes_max=bytes_max)

    async def _wait_for_response(
        self, query: Query, data: bytes, decision: Decision, bytes_max: int, *, is_tcp: bool
    ) -> bytes:
        """Return the response to ``query`` after waiting for rules or another name server."""
        failure = reply(query, SERVFAIL, bytes_max=bytes_max)
        match decision:
            case FoundName(answers, extra, virtual):
                try:
                    await self._resolver.load(virtual)
                except (SkepError, OSError) as error:
                    log.warning("virtual address not loaded", container=self._container, reason=str(error))
                    return failure
                return reply(query, NOERROR, answers, extra, ttl_s=TTL_S, bytes_max=bytes_max)
            case Foreign(is_single_label):
                found = await self._forwarder.forward(
                    ForwardedQuery(self._container, query, data, self.forwarding.inside, is_tcp),
                    self.forwarding.servers,
                    SINGLE_LABEL_S if is_single_label else DEADLINE_S,
                )
                if found is not None:
                    return fitting(found, query, bytes_max)
                return reply(query, NXDOMAIN, bytes_max=bytes_max) if is_single_label else failure
            case Missing():
                return failure

    def _accept(self) -> None:
        try:
            connection, _ = self.sockets.tcp.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                loop = asyncio.get_running_loop()
                loop.remove_reader(self.sockets.tcp)
                self._resuming = loop.call_later(ACCEPT_PAUSE_S, self._accept_again)
            return  # no connection is left, or no descriptor
        if len(self._connections) >= CONNECTIONS_MAX:
            connection.close()
            return
        connection = set_aside(connection)
        connection.setblocking(False)
        task = self._start_task(self._serve_connection(connection))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    def _accept_again(self) -> None:
        self._resuming = None
        asyncio.get_running_loop().add_reader(self.sockets.tcp, self._accept)

    async def _serve_connection(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            while True:
                async with asyncio.timeout(IDLE_S):
                    data = await read_message(connection)
                query = parse(data)
                if query is None:
                    return
                if isinstance(query, bytes):
                    response = self._counted(None, query)
                else:
                    response = await self._respond(query, data)
                async with asyncio.timeout(IDLE_S):
                    await loop.sock_sendall(connection, len(response).to_bytes(2, "big") + response)
        except (OSError, TimeoutError):
            return
        finally:
            connection.close()

    async def _respond(self, query: Query, data: bytes) -> bytes:
        self._forwarder.counts.question(query.type)
        decision = self._resolver.resolve(query)
        response = self._immediate(query, decision, TCP_BYTES_MAX)
        if response is None:
            response = await self._wait_for_response(query, data, decision, TCP_BYTES_MAX, is_tcp=True)
        return self._counted(decision, response)


def _bound(kind: socket.SocketKind, port: int) -> socket.socket:
    opened = socket.socket(socket.AF_INET, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, kind == socket.SOCK_STREAM)
        try:
            opened.bind((ADDRESS, port))
        except OSError:
            opened.bind((ADDRESS, 0))
    except BaseException:
        opened.close()
        raise
    return set_aside(opened)
