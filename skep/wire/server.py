"""The gRPC server of a manager: one port for nodes, managers and machines that want to become nodes.

``rpc`` implements the protocol.  This module admits connections, sets their limits, and finds the handler of a call:

* Every connection gets a GOAWAY before it is closed.  Without it, an engine would send heartbeats for another 40 s or
  more.
* An unknown method is refused as in gRPC (UNIMPLEMENTED, with a content type), because an engine's fallbacks depend on
  it.
* Anonymous connections (without a certificate) have tight limits on their number, streams, windows, messages and time.
  If there are too many, a new one replaces one of the address that has the most.  Silent connections could otherwise
  keep every machine from joining.
"""

import asyncio
import re
import socket
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress

import structlog
from msgspec.structs import replace

from skep.aio.connections.admission import Newcomers, source_of
from skep.aio.connections.handshakes import Handshakes
from skep.aio.groups import errors_as_they_are
from skep.errors import FailedPrecondition, SkepError, Unauthenticated, Unavailable, Unimplemented
from skep.model.values.ids import ClusterId, NodeId
from skep.rpc import frames
from skep.rpc.errors import LOST_PEER, to_status
from skep.rpc.frames import Code, Violation
from skep.rpc.server import PeerLimits, ServerConnection, ServerStream
from skep.rpc.status import CallFailed, StatusCode
from skep.security.authority import issued_s
from skep.security.identity import NodeIdentity, peer_identity
from skep.wire.access import Caller, CertificateCheck, accept_all, authorize
from skep.wire.service import Handler, HandlerStream, run_handler

log = structlog.get_logger(__name__)

CLOSE_SECONDS_MAX = 5.0
"""Seconds that handlers have to end when the server stops."""

CLOSED_PER_S, CLOSING_S_MAX = 200, 10.0
"""Number of connections closed per second, and the longest time that closing all of them may take.  The rate is
lower than the rate at which nodes can register again.
"""

NODE_CONNECTIONS_MAX = 32
"""Maximum simultaneous connections of one node.  A node needs two, the second one only briefly."""
NODE_LIMITS = PeerLimits(streams=100, stream_window=128 * 1024, connection_window=20 * 1024 * 1024)
"""Limits of a node's connection.

The windows of all streams and the largest message together are smaller than the connection's window.  Therefore unread
log streams never delay heartbeats.
"""
NODE_BYTES_MAX = 2 * NODE_LIMITS.connection_window
"""Maximum buffered request bytes of one node on all its connections together.  The connection that exceeds the limit is
closed.
"""

ANONYMOUS_MAX = 64
"""Maximum connections without a certificate.  Machines use them to join, and nodes to renew an expired certificate."""
ANONYMOUS_PER_SOURCE_MAX = 4
"""Maximum anonymous connections from one address."""
ANONYMOUS_SECONDS_MAX = 60.0
"""Maximum seconds of an anonymous connection."""
ANONYMOUS_SILENT_SECONDS_MAX = 5.0
"""Maximum seconds until the first call of an anonymous connection."""
ANONYMOUS_LIMITS = PeerLimits(streams=8, stream_window=frames.WINDOW, connection_window=frames.WINDOW)

_TIMEOUT = re.compile(r"([0-9]{1,8})([HMSmun])", re.ASCII)
_UNIT_S = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}


BACKLOG = 1024
"""Connections that the kernel queues.  After a lost manager, its nodes connect to the others at once."""


def closing_times(count: int) -> Sequence[float]:
    """Return when each of ``count`` connections is ended, in seconds from now."""
    apart_s = min(1 / CLOSED_PER_S, CLOSING_S_MAX / max(count, 1))
    return [number * apart_s for number in range(count)]


class Bound:
    """A listening server.  ``port`` is its actual port."""

    def __init__(self, port: int, server: "_Server", handshakes: Handshakes) -> None:
        self.port = port
        self.server = server
        self.pending = handshakes

    @property
    def handshakes(self) -> int:
        """Number of TLS handshakes in progress."""
        return self.pending.count

    @property
    def connections(self) -> int:
        """Number of connections that have completed their handshake."""
        return len(self.server.connections)

    @property
    def held_bytes(self) -> int:
        """Bytes of received requests that have no response yet."""
        return sum(connection.held for connection in self.server.connections)

    def disconnect_all(
        self, first: Callable[[NodeIdentity], bool], times: Callable[[int], Sequence[float]] = closing_times
    ) -> None:
        """End every connection and every handshake, so that peers which reconnect are checked by the current rules.

        Anonymous connections, and connections whose certificate matches ``first``, are ended at once.  The others
        are ended one after another at ``times``, so that thousands do not reconnect at one moment.
        """
        self.pending.give_up()
        loop, later = asyncio.get_running_loop(), []
        for connection in tuple(self.server.connections):
            if connection.identity is None or first(connection.identity):
                connection.close()
            else:
                later.append(connection)
        for connection, after_s in zip(later, times(len(later)), strict=True):
            loop.call_later(after_s, connection.close)

    def disconnect(self, matches: Callable[[NodeIdentity], bool]) -> None:
        """End the connections of callers whose certificate matches."""
        for connection in tuple(self.server.connections):
            if connection.identity is not None and matches(connection.identity):
                connection.close()


@asynccontextmanager
async def serve(
    handlers: Iterable[Handler],
    *,
    host: str,
    port: int,
    tls: ssl.SSLContext,
    cluster_id: ClusterId,
    check_certificate: CertificateCheck = accept_all,
    node_bytes_max: int = NODE_BYTES_MAX,
) -> AsyncIterator[Bound]:
    """Serve calls on ``host:port`` until the context is left.  Then every connection is closed.

    Args:
        tls: A context that requests client certificates (``security.tls.ServerTls.front``).
        cluster_id: The cluster that callers' certificates must name, except for open methods.
        check_certificate: Checks whether a caller's certificate is still accepted, for each call that needs one.
        node_bytes_max: Maximum buffered request bytes of one node on all its connections together.

    Raises:
        Unavailable: The address cannot be bound.
    """
    server = _Server(handlers, cluster_id, check_certificate, node_bytes_max)
    handshakes = Handshakes(server.new_protocol, tls)
    listener = _listen(host, port)
    try:
        async with errors_as_they_are(), asyncio.TaskGroup() as group:
            accepting = group.create_task(handshakes.accept(listener, group), name="accept connections")
            try:
                yield Bound(listener.getsockname()[1], server, handshakes)
            finally:
                accepting.cancel()
    finally:
        listener.close()
        server.close_connections()
        with suppress(TimeoutError):  # a handler that does not end is cancelled below
            async with asyncio.timeout(CLOSE_SECONDS_MAX):
                await server.wait_handlers()


def _listen(host: str, port: int) -> socket.socket:
    """Open the listening socket.  Raises Unavailable if the address cannot be bound."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise Unavailable(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    listener.setblocking(False)
    return listener


class _Server:
    """Creates a protocol for each connection, keeps track of the connections, and finds the handler of a call."""

    def __init__(
        self,
        handlers: Iterable[Handler],
        cluster_id: ClusterId,
        check_certificate: CertificateCheck,
        node_bytes_max: int = NODE_BYTES_MAX,
    ) -> None:
        self.node_bytes_max = node_bytes_max
        self._cluster_id = cluster_id
        self._check_certificate = check_certificate
        self._handlers: Mapping[str, Handler] = {
            handler.method.path: self._authorized(handler) for handler in handlers
        }
        self.connections: set[_Connection] = set()
        self.anonymous: Newcomers[_Connection] = Newcomers(
            "connections without a certificate",
            ANONYMOUS_MAX,
            ANONYMOUS_PER_SOURCE_MAX,
            _Connection.abort,
            may_leave=_Connection.may_leave,
        )
        self.of_node: Counter[NodeId] = Counter()
        self.bytes_of_node: Counter[NodeId] = Counter()

    def new_protocol(self) -> "_Connection":
        return _Connection(self)

    def refusal(self, identity: NodeIdentity | None) -> str:
        """Return why a connection is refused, or an empty string."""
        if identity is None:
            return ""
        return "too many of one node" if self.of_node[identity.node_id] >= NODE_CONNECTIONS_MAX else ""

    def forget(self, connection: "_Connection") -> None:
        """Forget a connection that has ended."""
        self.connections.discard(connection)
        self.anonymous.forget(connection)
        if (identity := connection.identity) is not None:
            self.of_node[identity.node_id] -= 1
            # Its handlers do not report their bytes when they end after this.
            self.bytes_of_node[identity.node_id] -= connection.held
            if not self.of_node[identity.node_id]:
                del self.of_node[identity.node_id]
                del self.bytes_of_node[identity.node_id]

    def close_connections(self) -> None:
        for connection in tuple(self.connections):
            connection.close()

    async def wait_handlers(self) -> None:
        for connection in tuple(self.connections):
            await connection.wait_closed()

    async def handle(self, stream: ServerStream, caller: Caller) -> None:
        """Serve one call within the client's deadline, and send its status."""
        request = stream.request
        with suppress(*LOST_PEER):
            if request.method != "POST":
                await stream.refuse(405)
                return
            if not request.content_type.startswith("application/grpc"):
                await stream.refuse(415)
                return
            try:
                async with asyncio.timeout(_timeout_s(request.timeout)):
                    await self._call(stream, caller)
            except CallFailed as error:
                await stream.send_status(error)
            except TimeoutError:
                await stream.send_status(CallFailed(StatusCode.DEADLINE_EXCEEDED, "the call took too long"))
            else:
                await stream.send_status()

    def _call(self, stream: ServerStream, caller: Caller) -> Coroutine[None, None, None]:
        """Return the handler's coroutine.  Raises CallFailed for an unknown method."""
        handler = self._handlers.get(stream.request.path)
        if handler is None:
            raise to_status(_unknown(stream.request.path))
        return run_handler(handler, stream, caller)

    def _authorized(self, handler: Handler) -> Handler:
        """Return ``handler`` with authorization before it."""

        def serve(stream: HandlerStream, caller: Caller) -> Awaitable[None]:
            authorize(caller, handler.method.access, self._cluster_id, self._check_certificate)
            return handler.serve(stream, caller)

        return Handler(handler.method, serve)


def _timeout_s(timeout: str) -> float | None:
    """Return the client's deadline in seconds, or None for a value that is not in gRPC's format."""
    match = _TIMEOUT.fullmatch(timeout)
    return int(match[1]) * _UNIT_S[match[2]] if match else None


def _unknown(path: str) -> SkepError:
    if path.startswith("/docker.swarmkit.v1.RaftMembership/"):
        # `docker swarm join` prints this if the user gave an engine the manager token.
        return FailedPrecondition(
            "this cluster takes Docker engines as workers only: join with the worker token instead"
        )
    return Unimplemented(f"unknown method {path}")


class _Connection(ServerConnection):
    """A connection.  Its limits depend on whether the peer has a certificate."""

    __slots__ = ("_time_limits", "caller", "has_crashed", "server", "since", "source")

    def __init__(self, server: _Server) -> None:
        super().__init__(self._handle_as_caller)
        self.server = server
        self.caller: Caller | None = None
        self.source = ""
        """The source address by which anonymous connections are counted."""
        self.since = 0.0
        """The event loop's time when it was opened or last became idle."""
        self.has_crashed = False
        """See ``Caller.has_crashed``."""
        self._time_limits: tuple[asyncio.TimerHandle, ...] = ()

    @property
    def identity(self) -> NodeIdentity | None:
        """The node at the other end, or None for an anonymous or refused connection."""
        return self.caller.identity if self.caller is not None else None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        identity, address = _identity_of(transport), _address_of(transport)
        self.source = source_of(address)
        if refusal := self.server.refusal(identity):
            log.warning("connection refused", reason=refusal, peer=address)
            transport.abort()
            return
        if identity is None and not self._begin_anonymous():
            log.warning("connection refused", reason="too many without a certificate", peer=address)
            transport.abort()
            return
        self.caller = Caller(
            identity=identity,
            address=address,
            disconnect=self.close,
            has_crashed=lambda: self.has_crashed,
        )
        self.server.connections.add(self)
        if identity is not None:
            self.server.of_node[identity.node_id] += 1
        self.begin(transport, NODE_LIMITS if identity is not None else ANONYMOUS_LIMITS)

    def _begin_anonymous(self) -> bool:
        loop = asyncio.get_running_loop()
        self.since = loop.time()
        if not self.server.anonymous.admit(self, self.source):
            return False
        self._time_limits = (
            loop.call_later(ANONYMOUS_SECONDS_MAX, self.close),
            loop.call_later(ANONYMOUS_SILENT_SECONDS_MAX, self._close_if_silent),
        )
        return True

    def _close_if_silent(self) -> None:
        if not self.has_called:
            self.close()

    def became_idle(self) -> None:
        if self.source and self in self.server.anonymous:
            self.since = asyncio.get_running_loop().time()
            self.server.anonymous.renew(self)

    def may_leave(self) -> bool:
        """Return whether it may be closed for another connection, because it is idle or has been open for long."""
        return self.is_idle or asyncio.get_running_loop().time() - self.since >= ANONYMOUS_SILENT_SECONDS_MAX

    def hold(self, size: int) -> None:
        super().hold(size)
        identity = self.identity
        if identity is None:
            return  # anonymous connections are few, and their windows are small
        held = self.server.bytes_of_node
        held[identity.node_id] += size
        if size > 0 and held[identity.node_id] > self.server.node_bytes_max:
            raise Violation("too many bytes of one node at a time", Code.ENHANCE_YOUR_CALM)

    def connection_lost(self, exc: BaseException | None) -> None:
        # Any other error comes from the network (ETIMEDOUT, EHOSTUNREACH) and says nothing about the machine.
        self.has_crashed = self.is_open and isinstance(exc, ConnectionResetError | None)
        super().connection_lost(exc)  # releases the request bytes it holds
        if self in self.server.connections:
            self.server.forget(self)
        self.caller = None  # breaks a cycle, as it refers to this connection
        for limit in self._time_limits:
            limit.cancel()
        self._time_limits = ()

    def _handle_as_caller(self, stream: ServerStream) -> Coroutine[None, None, None]:
        assert self.caller is not None
        return self.server.handle(stream, self.caller)


def _identity_of(transport: asyncio.Transport) -> NodeIdentity | None:
    """Return the node at the other end of a connection, or None without a certificate, which OpenSSL has verified."""
    certificate = transport.get_extra_info("peercert")
    if not certificate:
        return None
    try:
        identity = peer_identity(certificate)
    except Unauthenticated:
        return None
    return replace(
        identity, issued_s=issued_s(certificate), serial=f"{int(certificate['serialNumber'], 16):x}"
    )


def _address_of(transport: asyncio.Transport) -> str:
    peer = transport.get_extra_info("peername")
    return str(peer[0]) if peer else ""
