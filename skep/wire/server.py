"""The gRPC server of a manager: one port for nodes, managers and machines that want to become nodes.

grpclib does HTTP/2 and gRPC; what it leaves open is closed here:

* ``Server.close`` leaves connections open without a last word, and engines then heartbeat into the void for
  40 s and longer.  Here every connection gets a GOAWAY and is closed.
* Its answer for an unknown method lacks a content type, which grpc-go takes for UNKNOWN, so an engine's
  fallbacks on UNIMPLEMENTED never trigger.  Here an unknown method is a handler like any other.
* A stranger (a connection without a certificate) gets little: few connections, few streams, small windows,
  small messages, little time.
* asyncio keeps a read buffer of 256 KiB per TLS connection: most of what an idle node costs.
"""

import asyncio
import asyncio.sslproto
import socket
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import structlog
from google.protobuf.message import Message
from grpclib import const
from grpclib.config import Configuration
from grpclib.protocol import H2Protocol
from grpclib.server import Handler as ConnectionHandler
from grpclib.server import Server as GrpcServer
from grpclib.server import Stream
from h2.settings import SettingCodes

from skep.aio.groups import errors_as_they_are
from skep.aio.lean_grpc import CoalescingTransport, make_lean
from skep.errors import FailedPrecondition, SkepError, Unauthenticated, Unavailable, Unimplemented
from skep.model.ids import ClusterId, NodeId
from skep.security.identity import Identity, peer_identity
from skep.wire import swarm_pb2 as swarm
from skep.wire.access import Caller, Standing, authorize, in_good_standing
from skep.wire.errors import to_status
from skep.wire.service import Handler, run_handler

log = structlog.get_logger(__name__)

TLS_READ_BYTES = 16 * 1024
HANDSHAKE_SECONDS_MAX = 10.0
CLOSE_SECONDS_MAX = 5.0

NODE_CONNECTIONS_MAX = 32
"""Of one node at one time; it needs two, one of them for a moment."""
NODE_STREAMS_MAX = 100
NODE_STREAM_WINDOW = 128 * 1024
NODE_CONNECTION_WINDOW = 16 * 1024 * 1024
"""More than all streams' windows together: log streams that nobody reads never hold up heartbeats."""

STRANGERS_MAX = 64
STRANGER_SECONDS_MAX = 60.0
STRANGER_STREAMS_MAX = 8
STRANGER_WINDOW = 65_535


BACKLOG = 1024
ACCEPT_RETRY_S = 0.1
HANDSHAKES_MAX = 256
"""TLS handshakes at one time.  When there are more, the oldest is given up: an honest one takes milliseconds."""


class Bound:
    """A server that listens.  ``port``: the port it got."""

    def __init__(self, port: int, server: "_Server") -> None:
        self.port = port
        self._server = server

    @property
    def handshakes(self) -> int:
        """TLS handshakes under way."""
        return len(self._server.handshakes)

    @property
    def connections(self) -> int:
        """Connections past their handshake."""
        return len(self._server.connections)

    def disconnect(self, who: Callable[[Identity], bool]) -> None:
        """End the connections of callers for whose certificate ``who`` is true."""
        for connection in tuple(self._server.connections):
            caller = connection.caller
            if caller is not None and caller.identity is not None and who(caller.identity):
                connection.say_goodbye()


@asynccontextmanager
async def serve(
    handlers: Iterable[Handler],
    *,
    host: str,
    port: int,
    tls: ssl.SSLContext,
    cluster_id: ClusterId,
    standing: Standing = in_good_standing,
) -> AsyncIterator[Bound]:
    """Answer calls on ``host:port`` until the context is left; then every connection is closed.

    Args:
        tls: a context that asks for client certificates (``security.tls.ServerTls.front``).
        cluster_id: what callers' certificates must name, except for open methods.
        standing: whether a caller's certificate still counts; asked at every call that is not open to anybody.

    Raises:
        Unavailable: the address cannot be bound.
    """
    asyncio.sslproto.SSLProtocol.max_size = TLS_READ_BYTES
    make_lean()
    server = _Server(handlers, cluster_id, standing)
    listener = _listen(host, port)
    try:
        async with errors_as_they_are(), asyncio.TaskGroup() as group:
            accepting = group.create_task(_accept(listener, server, tls, group), name="accept connections")
            try:
                yield Bound(listener.getsockname()[1], server)
            finally:
                accepting.cancel()
                server.give_up_handshakes()
    finally:
        listener.close()
        server.close_connections()
        with suppress(TimeoutError):  # a handler that does not end is cancelled with everything else
            async with asyncio.timeout(CLOSE_SECONDS_MAX):
                await server.wait_handlers()


def _listen(host: str, port: int) -> socket.socket:
    """Raises: Unavailable: the address cannot be bound."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise Unavailable(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    listener.setblocking(False)
    return listener


async def _accept(
    listener: socket.socket, server: "_Server", tls: ssl.SSLContext, group: asyncio.TaskGroup
) -> None:
    """Accept connections until cancelled.

    Not left to asyncio, which holds any number of handshakes: 10,000 connections that say nothing would cost a
    manager a gigabyte.
    """
    loop = asyncio.get_running_loop()
    while True:
        try:
            connection, _ = await loop.sock_accept(listener)
        except OSError as error:  # out of descriptors, or the peer has gone already
            log.warning("connection not accepted", error=str(error))
            await asyncio.sleep(ACCEPT_RETRY_S)
            continue
        server.begin_handshake(group.create_task(_shake_hands(connection, server, tls), name="handshake"))
        await asyncio.sleep(0)  # lets the handshake begin: it owns the socket from then on


async def _shake_hands(connection: socket.socket, server: "_Server", tls: ssl.SSLContext) -> None:
    loop = asyncio.get_running_loop()
    try:
        await loop.connect_accepted_socket(
            server.new_protocol, connection, ssl=tls, ssl_handshake_timeout=HANDSHAKE_SECONDS_MAX
        )
    except OSError as error:  # TLS errors and lost peers are some
        log.debug("handshake failed", error=str(error) or type(error).__name__)


class _Server(GrpcServer):
    """grpclib's server without its listener: makes a protocol per connection and knows all of them."""

    def __init__(self, handlers: Iterable[Handler], cluster_id: ClusterId, standing: Standing) -> None:
        super().__init__(())
        self._cluster_id = cluster_id
        self._standing = standing
        self._methods = _Methods(self)
        self._is_flooded = False
        for handler in handlers:
            self._methods[handler.method.path] = self._bound(handler)
        self.connections: set[_Connection] = set()
        self.strangers: set[_Connection] = set()
        self.of_node: Counter[NodeId] = Counter()
        self.handshakes: dict[asyncio.Task[None], None] = {}
        """Under way, oldest first."""

    def begin_handshake(self, task: asyncio.Task[None]) -> None:
        """A connection was accepted; when there are too many, the oldest makes room."""
        if len(self.handshakes) >= HANDSHAKES_MAX:
            oldest = next(iter(self.handshakes))
            del self.handshakes[oldest]
            oldest.cancel()
            if not self._is_flooded:
                log.warning("too many handshakes at one time: the oldest are given up", most=HANDSHAKES_MAX)
            self._is_flooded = True
        self.handshakes[task] = None
        task.add_done_callback(self._end_handshake)

    def _end_handshake(self, task: asyncio.Task[None]) -> None:
        self.handshakes.pop(task, None)
        self._is_flooded = self._is_flooded and bool(self.handshakes)

    def give_up_handshakes(self) -> None:
        for task in tuple(self.handshakes):
            task.cancel()

    def new_protocol(self) -> "_Connection":
        handler = ConnectionHandler(self._methods, self._codec, None, self.__dispatch__)
        return _Connection(self, handler, self._config, self._h2_config)

    def refusal(self, identity: Identity | None) -> str:
        """Why a connection is not taken; empty: it is."""
        if identity is None:
            return "too many without a certificate" if len(self.strangers) >= STRANGERS_MAX else ""
        return "too many of one node" if self.of_node[identity.node_id] >= NODE_CONNECTIONS_MAX else ""

    def forget(self, connection: "_Connection") -> None:
        """It has ended."""
        self.connections.discard(connection)
        self.strangers.discard(connection)
        identity = connection.caller.identity if connection.caller is not None else None
        if identity is not None:
            self.of_node[identity.node_id] -= 1
            if not self.of_node[identity.node_id]:
                del self.of_node[identity.node_id]

    def close_connections(self) -> None:
        for connection in tuple(self.connections):
            connection.say_goodbye()

    async def wait_handlers(self) -> None:
        for connection in tuple(self.connections):
            await connection.calls.wait_closed()

    def _bound(self, handler: Handler) -> const.Handler:
        async def function(stream: Stream[Any, Any]) -> None:
            caller = caller_of(stream)
            try:
                authorize(caller, handler.method.access, self._cluster_id, self._standing)
            except SkepError as error:
                raise to_status(error) from error
            await run_handler(handler, stream, caller)

        return const.Handler(function, handler.cardinality, handler.method.request, handler.method.reply)


class _Methods(dict[str, const.Handler]):
    """Method path -> handler; unknown ones get a handler that refuses."""

    def __init__(self, server: _Server) -> None:
        super().__init__()
        self._refusal = const.Handler(
            _refuse, const.Cardinality.STREAM_STREAM, swarm.PublishLogsResponse, swarm.PublishLogsResponse
        )

    def get(self, path: str, default: Any = None) -> const.Handler:
        """The handler of ``path``; grpclib asks with ``get``."""
        return super().get(path) or self._refusal


async def _refuse(stream: Stream[Message, Message]) -> None:
    path = stream._method_name
    if path.startswith("/docker.swarmkit.v1.RaftMembership/"):
        # `docker swarm join` prints this when an engine was given the manager token.
        raise to_status(
            FailedPrecondition(
                "this cluster takes Docker engines as workers only: join with the worker token instead"
            )
        )
    raise to_status(Unimplemented(f"unknown method {path}"))


class _Connection(H2Protocol):
    """One connection.  What it is granted depends on whether the peer showed a certificate."""

    def __init__(
        self, server: _Server, handler: ConnectionHandler, config: Configuration, h2_config: Any
    ) -> None:
        super().__init__(handler, config, h2_config)
        self._server = server
        self.calls = handler
        self.caller: Caller | None = None
        self._time_limit: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        identity = _identity_of(transport)
        is_stranger = identity is None
        if refusal := self._server.refusal(identity):
            log.warning("connection refused", reason=refusal, peer=_address_of(transport))
            assert isinstance(transport, asyncio.Transport)
            transport.abort()
            return
        self.caller = Caller(identity=identity, address=_address_of(transport), disconnect=self.say_goodbye)
        self.config = replace(
            self.config,
            http2_stream_window_size=STRANGER_WINDOW if is_stranger else NODE_STREAM_WINDOW,
            http2_connection_window_size=STRANGER_WINDOW if is_stranger else NODE_CONNECTION_WINDOW,
        )
        assert isinstance(transport, asyncio.Transport)
        super().connection_made(CoalescingTransport(transport))
        streams = STRANGER_STREAMS_MAX if is_stranger else NODE_STREAMS_MAX
        self.connection._connection.update_settings({SettingCodes.MAX_CONCURRENT_STREAMS: streams})
        self.connection.flush()
        # grpclib hands a handler only the peer of its stream: let that one carry who it is.
        self.connection.skep_caller = self.caller  # type: ignore[attr-defined]
        self._server.connections.add(self)
        if identity is not None:
            self._server.of_node[identity.node_id] += 1
        if is_stranger:
            self._server.strangers.add(self)
            loop = asyncio.get_running_loop()
            self._time_limit = loop.call_later(STRANGER_SECONDS_MAX, self.say_goodbye)

    def data_received(self, data: bytes) -> None:
        if not hasattr(self, "processor"):
            return  # refused above
        try:
            super().data_received(data)
        except NotImplementedError:  # an HTTP/2 event grpclib does not know: no gRPC peer causes one
            log.info("connection closed: not a gRPC peer", peer=self.caller and self.caller.address)
            self.say_goodbye()

    def pause_writing(self) -> None:
        """The peer does not read: take no more of its pings and settings, each of which has an answer to hold."""
        super().pause_writing()
        self._transport().pause_reading()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._transport().resume_reading()

    def _transport(self) -> asyncio.Transport:
        transport = self.connection._transport
        assert isinstance(transport, asyncio.Transport)
        return transport

    def connection_lost(self, exc: BaseException | None) -> None:
        if self in self._server.connections:
            self._server.forget(self)
        if self._time_limit is not None:
            self._time_limit.cancel()
        if hasattr(self, "processor"):
            super().connection_lost(exc)

    def say_goodbye(self) -> None:
        """End the connection with a GOAWAY, so that the peer looks for another one at once."""
        if self.connection.is_closing():
            return
        self.connection._connection.close_connection()
        self.connection.flush()
        self.processor.close("the connection was closed")


def caller_of(stream: Stream[Any, Any]) -> Caller:
    """Who makes this call."""
    caller: Caller = stream._stream.connection.skep_caller  # type: ignore[attr-defined]
    return caller


def _identity_of(transport: asyncio.BaseTransport) -> Identity | None:
    """The node behind a connection; None: it showed no certificate (OpenSSL has verified the one it showed)."""
    connection: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
    certificate = connection.getpeercert() if connection is not None else None
    if not certificate:
        return None
    try:
        return peer_identity(certificate)
    except Unauthenticated:
        return None


def _address_of(transport: asyncio.BaseTransport) -> str:
    peer = transport.get_extra_info("peername")
    return str(peer[0]) if peer else ""
