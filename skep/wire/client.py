"""Calls a manager over one connection, and raises Skep's errors instead of gRPC's.

The manager's certificate must contain the name of its role.  Its address is not verified.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from typing import Generic, TypeVar

from google.protobuf.message import Message

from skep.aio.connections.tls import connect
from skep.errors import InvalidArgument, Unauthenticated, Unavailable, reason_of
from skep.model.networks.addresses import parted
from skep.model.values.ids import NodeId
from skep.rpc.client import Bounds, ClientConnection, ClientStream
from skep.rpc.errors import peer_errors
from skep.rpc.headers import request_block
from skep.security.identity import peer_identity
from skep.wire.methods import Method, UnaryMethod

Q = TypeVar("Q", bound=Message)
A = TypeVar("A", bound=Message)

CONNECT_SECONDS_MAX = 5.0
"""Timeout for opening a connection."""
CALL_SECONDS_MAX = 5.0
"""Timeout of a call, the same as in Docker Engines."""

BOUNDS = Bounds(stream_window=4 * 1024 * 1024, connection_window=64 * 1024 * 1024, message=128 * 1024 * 1024)
"""Large windows, because a manager sends a node all its tasks, secrets and configs at once."""


class StreamCall(Generic[Q, A]):
    """An open streaming call.  It reaches the server with its first message, as in gRPC."""

    def __init__(self, connection: ClientConnection, block: bytes, reply: type[A], address: str) -> None:
        self._connection = connection
        self._block = block
        self._reply = reply
        self._address = address
        self._stream: ClientStream | None = None

    async def send(self, message: Q, *, end: bool = False) -> None:
        """Send one message, the last one with ``end``.  Waits while the peer reads slowly."""
        data = message.SerializeToString()
        with peer_errors(self._address):
            if self._stream is None:
                self._stream = self._connection.open()
                self._stream.begin(self._block, data, is_last=end)
            else:
                self._stream.send(data, is_last=end)
            await self._stream.drain()

    async def receive(self) -> A | None:
        """Return the next message, or None after the last.  Raises the error of the peer's status unless that is OK."""
        assert self._stream is not None, "the caller sends first"
        with peer_errors(self._address):
            message = await self._stream.receive()
            return None if message is None else self._reply.FromString(message)

    async def __aiter__(self) -> AsyncIterator[A]:
        while (message := await self.receive()) is not None:
            yield message

    def close(self) -> None:
        """Abandon the call, unless it has ended."""
        if self._stream is not None:
            self._connection.release(self._stream)
            self._stream = None


class ManagerChannel:
    """A connection to a manager, opened by ``open_channel``.  ``peer`` is the node in its certificate, empty if
    unknown.
    """

    def __init__(self, address: str, connection: ClientConnection, name: str, peer: NodeId) -> None:
        self.address = address
        self.peer = peer
        self._connection = connection
        self._name = name

    @property
    def is_lost(self) -> bool:
        """Whether no further call can be made on it."""
        return self._connection.is_lost

    async def call(self, method: UnaryMethod[Q, A], request: Q, *, timeout_s: float = CALL_SECONDS_MAX) -> A:
        """Make a call.  Raises Unavailable without a response in time, otherwise the error of the manager's status."""
        with peer_errors(self.address):
            async with asyncio.timeout(timeout_s):
                with self._connection.stream() as stream:
                    stream.begin(self._block(method), request.SerializeToString(), is_last=True)
                    return method.reply.FromString(await stream.only_message())

    @asynccontextmanager
    async def stream(self, method: Method[Q, A]) -> AsyncIterator[StreamCall[Q, A]]:
        """Open a streaming call.  Leaving the context abandons it if it has not ended."""
        call: StreamCall[Q, A] = StreamCall(self._connection, self._block(method), method.reply, self.address)
        with closing(call):
            yield call

    def _block(self, method: Method[Q, A]) -> bytes:
        return request_block(method.path, None, scheme="https", authority=self._name)


@asynccontextmanager
async def open_channel(
    address: str,
    tls: ssl.SSLContext,
    name: str,
    *,
    timeout_s: float = CONNECT_SECONDS_MAX,
    bounds: Bounds = BOUNDS,
) -> AsyncIterator[ManagerChannel]:
    """Open a connection to the manager at ``address`` (``ip:port``), whose certificate must be for ``name``.

    Args:
        bounds: Limits of received messages.

    Raises:
        Unavailable: It is not reachable, or not trusted.
        InvalidArgument: ``address`` is not an address.
    """
    host, port = split_address(address)
    with peer_errors(address):
        async with asyncio.timeout(timeout_s):
            connection = await _connect(host, port, tls, name, bounds)
    try:
        yield ManagerChannel(address, connection, name, _peer_of(connection))
    finally:
        connection.close()


def _peer_of(connection: ClientConnection) -> NodeId:
    try:
        return peer_identity(connection.peer_certificate).node_id
    except Unauthenticated:
        return NodeId(
            ""
        )  # The certificate was not verified, because a node without a root certificate cannot do so.


async def _connect(host: str, port: int, tls: ssl.SSLContext, name: str, bounds: Bounds) -> ClientConnection:
    """Connect.  Raises Unavailable if the address is not reachable, or the error of the TLS handshake."""
    try:
        return await connect(
            lambda: ClientConnection(bounds, coalesces=True), host, port, tls, server_name=name
        )
    except OSError as error:
        if isinstance(error, ssl.SSLError | TimeoutError):
            raise
        raise Unavailable(f"cannot reach {host}:{port}: {reason_of(error)}") from error


def split_address(address: str) -> tuple[str, int]:
    """Split ``"10.0.0.1:2377"`` or ``"[::1]:2377"`` into host and port.  Raises InvalidArgument."""
    host, port = parted(address)
    if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 65536:
        raise InvalidArgument(f"invalid address {address!r}: expected host:port")
    return host, int(port)
