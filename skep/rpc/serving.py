"""Server side of gRPC on a connection whose peer needs no certificate: calls, their messages and limits."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from typing import Generic, Protocol, TypeVar

import structlog
from google.protobuf.message import DecodeError, Message

from skep.errors import InvalidArgument, ResourceExhausted, SkepError, Unimplemented
from skep.rpc.core import MESSAGE_HEAD
from skep.rpc.errors import LOST_PEER, to_status
from skep.rpc.headers import CallHeaders
from skep.rpc.server import PeerLimits, ServerConnection, ServerStream
from skep.rpc.status import CallFailed, StatusCode

log = structlog.get_logger(__name__)

Q = TypeVar("Q", bound=Message)

LIMITS = PeerLimits(streams=64, stream_window=1 << 20, connection_window=4 << 20)
MESSAGE_BYTES_MAX = 16 << 20
"""Largest message, which is BuildKit's limit."""
_MESSAGE_S = 60.0
"""Seconds between the arrival of a message's length and its end."""


class UnaryHandler(Generic[Q]):
    """A method with one request and one response."""

    def __init__(self, request: type[Q], serve: Callable[[Q, CallHeaders], Awaitable[Message]]) -> None:
        self.request = request
        self._serve = serve

    async def respond(self, stream: ServerStream) -> None:
        """Serve one call."""
        request = await _only_request(self.request, stream)
        await stream.send_message(await self._serve(request, stream.request))


class Streaming(Generic[Q]):
    """A method with one request and a stream of responses from a generator."""

    def __init__(
        self, request: type[Q], serve: Callable[[Q, CallHeaders], AsyncGenerator[Message, None]]
    ) -> None:
        self.request = request
        self._serve = serve

    async def respond(self, stream: ServerStream) -> None:
        """Serve one call."""
        request = await _only_request(self.request, stream)
        await stream.send_initial_metadata()
        async with aclosing(self._serve(request, stream.request)) as responses:
            async for response in responses:
                await stream.send_message(response)


class Both:
    """A method in which both sides send streams."""

    def __init__(self, serve: Callable[[ServerStream], Awaitable[None]]) -> None:
        self._serve = serve

    async def respond(self, stream: ServerStream) -> None:
        """Serve one call."""
        await self._serve(stream)


class ServedMethod(Protocol):
    """Handler of calls to one method."""

    async def respond(self, stream: ServerStream) -> None:
        """Serve one call.  Raises: SkepError, CallFailed: its status."""


def connection(methods: Mapping[str, ServedMethod]) -> ServerConnection:
    """Return the protocol of a connection that serves ``methods`` (by path) to the client."""

    async def handle(stream: ServerStream) -> None:
        with suppress(*LOST_PEER):
            try:
                await _serve(methods, stream)
            except CallFailed as error:
                await stream.send_status(error)
            else:
                await stream.send_status()

    return ServerConnection(handle)


async def _serve(methods: Mapping[str, ServedMethod], stream: ServerStream) -> None:
    """Serve one call.  Raises: CallFailed: with the status of any error."""
    method = methods.get(stream.request.path)
    try:
        if method is None:
            raise Unimplemented(f"unknown method {stream.request.path}")
        await method.respond(stream)
    except SkepError as error:
        raise to_status(error) from error
    except TimeoutError as error:
        raise CallFailed(StatusCode.DEADLINE_EXCEEDED, "the call took too long") from error
    except (*LOST_PEER, CallFailed):
        raise
    except Exception as error:
        log.exception("call failed", method=stream.request.path)
        raise CallFailed(StatusCode.INTERNAL, "internal error") from error


async def _only_request(kind: type[Q], stream: ServerStream) -> Q:
    """Receive the call's only request.  Raises: InvalidArgument, ResourceExhausted, TimeoutError."""
    data = await receive_message(stream, _MESSAGE_S)
    if data is None:
        raise InvalidArgument("the request is missing")
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise InvalidArgument("the message cannot be decoded") from error


async def receive_message(stream: ServerStream, within_s: float | None = None) -> bytes | None:
    """Return the client's next message, encoded, or None after the last.

    ``within_s``: Seconds until its start must arrive.

    Raises: InvalidArgument, ResourceExhausted, TimeoutError.
    """
    try:
        head = await stream.recv_data(MESSAGE_HEAD.size, within_s)
        if not head:
            return None
        is_compressed, size = MESSAGE_HEAD.unpack(head)
        if is_compressed:
            raise Unimplemented("compressed messages are not supported")
        if size > MESSAGE_BYTES_MAX:
            raise ResourceExhausted(
                f"grpc: received message larger than max ({size} vs. {MESSAGE_BYTES_MAX})"
            )
        return await stream.recv_data(size, _MESSAGE_S)
    except AssertionError as error:
        raise InvalidArgument("the message cannot be decoded") from error
