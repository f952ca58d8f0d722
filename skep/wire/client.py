"""Calls to a manager over one connection, with our errors instead of gRPC's.

The manager's certificate is verified for a name of its role, never for its address.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, Generic, TypeVar

from google.protobuf.message import DecodeError, Message
from grpclib.client import Channel as GrpcChannel
from grpclib.client import Handler, Stream
from grpclib.config import Configuration
from grpclib.const import Cardinality
from grpclib.exceptions import GRPCError, ProtocolError, StreamTerminatedError
from grpclib.protocol import H2Protocol

from skep.aio.grpc import breaks_of_grpclib
from skep.aio.lean_grpc import CoalescingTransport, make_lean
from skep.errors import InvalidArgument, Unavailable, reason_of
from skep.model.addresses import parted
from skep.wire.errors import PUSHBACK, peer_errors, told_pushback
from skep.wire.methods import BothStream, ClientStream, Method, ServerStream, Unary

Q = TypeVar("Q", bound=Message)
A = TypeVar("A", bound=Message)

CONNECT_SECONDS_MAX = 5.0
CALL_SECONDS_MAX = 5.0
"""Engines give their calls the same time."""

_CARDINALITY: dict[type[Any], Cardinality] = {
    Unary: Cardinality.UNARY_UNARY,
    ServerStream: Cardinality.UNARY_STREAM,
    ClientStream: Cardinality.STREAM_UNARY,
    BothStream: Cardinality.STREAM_STREAM,
}


class Call(Generic[Q, A]):
    """One open streaming call."""

    def __init__(self, stream: Stream[Q, A], address: str) -> None:
        self._stream = stream
        self._address = address

    async def send(self, message: Q, *, end: bool = False) -> None:
        """Send one message; waits while the peer reads slowly.  ``end``: it is the last one."""
        with _answer_of(self._stream, self._address):
            await self._stream.send_message(message, end=end)

    async def receive(self) -> A | None:
        """The next message, or None after the last.  Raises what the peer answered instead of OK."""
        with _answer_of(self._stream, self._address):
            message = await self._stream.recv_message()
            if message is None:
                await _end(self._stream)
            return message

    async def __aiter__(self) -> AsyncIterator[A]:
        while (message := await self.receive()) is not None:
            yield message


class Channel:
    """One connection to a manager; made by ``connected``."""

    def __init__(self, address: str, channel: GrpcChannel) -> None:
        self.address = address
        self._channel = channel

    async def call(self, method: Unary[Q, A], request: Q, *, timeout_s: float = CALL_SECONDS_MAX) -> A:
        """Raises: Unavailable: no answer in time; otherwise what the manager answered."""
        async with self._open(method) as stream:
            with _answer_of(stream, self.address):
                async with asyncio.timeout(timeout_s):
                    await stream.send_message(request, end=True)
                    reply = await stream.recv_message()
                    await stream.recv_trailing_metadata()
        assert reply is not None  # a unary call without a reply ends with an error status
        return reply

    @asynccontextmanager
    async def stream(self, method: Method[Q, A]) -> AsyncIterator[Call[Q, A]]:
        """A streaming call; leaving the context abandons it if it has not ended."""
        async with self._open(method) as stream:
            yield Call(stream, self.address)

    @asynccontextmanager
    async def _open(self, method: Method[Q, A]) -> AsyncIterator[Stream[Q, A]]:
        cardinality = _CARDINALITY[type(method)]
        stream: Stream[Q, A] = self._channel.request(method.path, cardinality, method.request, method.reply)
        # Entered and left by hand: grpclib's own exit waits for the peer's last word, for ever if need be.
        await stream.__aenter__()
        try:
            yield stream
        finally:
            with suppress(ProtocolError, StreamTerminatedError, OSError), breaks_of_grpclib():
                _abandon(stream)


@asynccontextmanager
async def connected(
    address: str, tls: ssl.SSLContext, name: str, *, timeout_s: float = CONNECT_SECONDS_MAX
) -> AsyncIterator[Channel]:
    """A connection to the manager at ``address`` (``ip:port``), whose certificate must be for ``name``.

    Raises: Unavailable: not reachable, or not trusted; InvalidArgument: no address.
    """
    host, port = split_address(address)
    config = Configuration(
        ssl_target_name_override=name,
        http2_connection_window_size=64 * 1024 * 1024,
        http2_stream_window_size=4 * 1024 * 1024,
    )
    make_lean()
    channel = _GrpcChannel(host, port, ssl=tls, config=config)
    try:
        with peer_errors(address):
            async with asyncio.timeout(timeout_s):
                await _connect(channel, address)
        yield Channel(address, channel)
    finally:
        channel.close()


async def _connect(channel: GrpcChannel, address: str) -> None:
    """Raises: Unavailable: nothing is reached there; otherwise as the handshake of TLS ends."""
    try:
        await channel.__connect__()
    except OSError as error:
        if isinstance(error, ssl.SSLError | TimeoutError):
            raise
        raise Unavailable(f"cannot reach {address}: {reason_of(error)}") from error


class _GrpcChannel(GrpcChannel):
    def _protocol_factory(self) -> H2Protocol:
        return _Connection(Handler(), self._config, self._h2_config)


class _Connection(H2Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        super().connection_made(CoalescingTransport(transport))


def split_address(address: str) -> tuple[str, int]:
    """``"10.0.0.1:2377"`` or ``"[::1]:2377"`` -> host and port.  Raises: InvalidArgument."""
    host, port = parted(address)
    if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 65536:
        raise InvalidArgument(f"invalid address {address!r}: want host:port")
    return host, int(port)


@contextmanager
def _answer_of(stream: Stream[Any, Any], address: str) -> Iterator[None]:
    """Raise as our error what the peer answered; its status counts for more than its closing the stream."""
    with peer_errors(address):
        try:
            yield
        except GRPCError as error:
            error.details = _pushback_of(stream)
            raise
        except StreamTerminatedError:
            if stream._send_request_done:
                stream._maybe_raise()
            raise
        except AssertionError as error:  # grpclib's way to say that a message ended early
            raise DecodeError("the message is incomplete") from error


def _pushback_of(stream: Stream[Any, Any]) -> float | None:
    """When to come again, in seconds, as the refusal says; grpclib shows no trailers of gRPC's own."""
    inner = stream._stream
    return told_pushback(dict(inner.trailers or inner.headers or ()).get(PUSHBACK))


async def _end(stream: Stream[Any, Any]) -> None:
    """Take the peer's last word, though we may have more to send."""
    stream._end_done = True
    await stream.recv_trailing_metadata()


def _abandon(stream: Stream[Any, Any]) -> None:
    """Give the stream back; tell the peer if it has not ended."""
    if not stream._send_request_done:
        return
    inner = stream._stream
    if inner.closable:
        inner.reset_nowait()
    stream._release_stream()
