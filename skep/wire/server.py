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
from collections.abc import AsyncIterator, Iterable
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

from skep.errors import FailedPrecondition, SkepError, Unauthenticated, Unavailable, Unimplemented
from skep.model.ids import ClusterId
from skep.security.identity import Identity, peer_identity
from skep.wire import swarm_pb2 as swarm
from skep.wire.access import Caller, authorize
from skep.wire.errors import to_status
from skep.wire.service import Handler, run_handler

log = structlog.get_logger(__name__)

TLS_READ_BYTES = 16 * 1024
HANDSHAKE_SECONDS_MAX = 10.0
CLOSE_SECONDS_MAX = 5.0

NODE_STREAMS_MAX = 100
NODE_STREAM_WINDOW = 128 * 1024
NODE_CONNECTION_WINDOW = 16 * 1024 * 1024
"""More than all streams' windows together: log streams that nobody reads never hold up heartbeats."""

STRANGERS_MAX = 64
STRANGER_SECONDS_MAX = 60.0
STRANGER_STREAMS_MAX = 8
STRANGER_WINDOW = 65_535


class Bound:
    """A server that listens.  ``port``: the port it got."""

    def __init__(self, port: int) -> None:
        self.port = port


@asynccontextmanager
async def serve(
    handlers: Iterable[Handler],
    *,
    host: str,
    port: int,
    tls: ssl.SSLContext,
    cluster_id: ClusterId,
) -> AsyncIterator[Bound]:
    """Answer calls on ``host:port`` until the context is left; then every connection is closed.

    Args:
        tls: a context that asks for client certificates (``security.tls.ServerTls.front``).
        cluster_id: what callers' certificates must name, except for open methods.

    Raises:
        Unavailable: the address cannot be bound.
    """
    asyncio.sslproto.SSLProtocol.max_size = TLS_READ_BYTES
    server = _Server(handlers, cluster_id)
    loop = asyncio.get_running_loop()
    try:
        listener = await loop.create_server(
            server.new_protocol,
            host,
            port,
            ssl=tls,
            ssl_handshake_timeout=HANDSHAKE_SECONDS_MAX,
            reuse_address=True,
        )
    except OSError as error:
        raise Unavailable(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    try:
        yield Bound(_port_of(listener.sockets))
    finally:
        listener.close()
        server.close_connections()
        with suppress(TimeoutError):  # a handler that does not end is cancelled with everything else
            async with asyncio.timeout(CLOSE_SECONDS_MAX):
                await server.wait_handlers()


class _Server(GrpcServer):
    """grpclib's server without its listener: makes a protocol per connection and knows all of them."""

    def __init__(self, handlers: Iterable[Handler], cluster_id: ClusterId) -> None:
        super().__init__(())
        self._cluster_id = cluster_id
        self._methods = _Methods(self)
        for handler in handlers:
            self._methods[handler.method.path] = self._bound(handler)
        self.connections: set[_Connection] = set()
        self.strangers: set[_Connection] = set()

    def new_protocol(self) -> "_Connection":
        handler = ConnectionHandler(self._methods, self._codec, None, self.__dispatch__)
        return _Connection(self, handler, self._config, self._h2_config)

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
                authorize(caller, handler.method.access, self._cluster_id)
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
        if is_stranger and len(self._server.strangers) >= STRANGERS_MAX:
            log.warning("connection refused: too many without a certificate", strangers=STRANGERS_MAX)
            assert isinstance(transport, asyncio.Transport)
            transport.abort()
            return
        self.caller = Caller(identity=identity, address=_address_of(transport), disconnect=self.say_goodbye)
        self.config = replace(
            self.config,
            http2_stream_window_size=STRANGER_WINDOW if is_stranger else NODE_STREAM_WINDOW,
            http2_connection_window_size=STRANGER_WINDOW if is_stranger else NODE_CONNECTION_WINDOW,
        )
        super().connection_made(transport)
        streams = STRANGER_STREAMS_MAX if is_stranger else NODE_STREAMS_MAX
        self.connection._connection.update_settings({SettingCodes.MAX_CONCURRENT_STREAMS: streams})
        self.connection.flush()
        # grpclib hands a handler only the peer of its stream: let that one carry who it is.
        self.connection.skep_caller = self.caller  # type: ignore[attr-defined]
        self._server.connections.add(self)
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

    def connection_lost(self, exc: BaseException | None) -> None:
        self._server.connections.discard(self)
        self._server.strangers.discard(self)
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


def _port_of(sockets: Iterable[socket.socket]) -> int:
    return int(next(iter(sockets)).getsockname()[1])
