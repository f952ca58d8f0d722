"""Binds functions to methods, for ``server.serve``.

A handler gets messages and a ``Caller``, and raises Skep's errors.  Streams are async iterators.  A handler must end a
stream by returning.  If it is cancelled, the peer gets no status, and grpc-go waits on the dead stream forever.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

import msgspec
import structlog
from google.protobuf.message import DecodeError, Message

from skep.errors import InvalidArgument, ResourceExhausted, SkepError, Unimplemented
from skep.rpc.errors import LOST_PEER, to_status
from skep.rpc.status import CallFailed, StatusCode
from skep.wire.access import Caller
from skep.wire.methods import BothStream, ClientStreaming, Method, ServerStreaming, UnaryMethod

log = structlog.get_logger(__name__)

Q = TypeVar("Q", bound=Message)
A = TypeVar("A", bound=Message)

STRANGER_REQUEST_BYTES_MAX = 32 * 1024
"""Maximum bytes of a request without a certificate, for all methods.  A certificate request has 500 bytes."""

UNARY_SECONDS_MAX = 60.0
"""Seconds after which a unary call ends even if the peer set no deadline."""

MESSAGE_SECONDS_MAX = 60.0
"""Seconds within which a message must be complete once its length has arrived."""


class HandlerStream(Protocol):
    """The call for a handler, with framed requests and responses."""

    async def recv_data(self, size: int, within_s: float | None = None) -> bytes:
        """Return exactly ``size`` bytes, or nothing after the last message.

        Raises:
            AssertionError: The stream ends in between.
            TimeoutError: They took longer than ``within_s`` to arrive.
        """

    async def send_initial_metadata(self) -> None:
        """Send the response's headers."""

    async def send_message(self, message: Message) -> None:
        """Send a message.  Waits while the peer reads slowly."""


class Handler(msgspec.Struct, frozen=True):
    """A method with the function that serves it."""

    method: Method[Any, Any]
    serve: Callable[[HandlerStream, Caller], Awaitable[None]]


def unary(method: UnaryMethod[Q, A], function: Callable[[Q, Caller], Awaitable[A]]) -> Handler:
    """Handle a method with one request and one response, which together may take ``UNARY_SECONDS_MAX``."""

    async def serve(stream: HandlerStream, caller: Caller) -> None:
        async with asyncio.timeout(UNARY_SECONDS_MAX):
            request = await _only_request(stream, method, caller)
            reply = await function(request, caller)
        await stream.send_message(reply)

    return Handler(method, serve)


def server_stream(
    method: ServerStreaming[Q, A],
    function: Callable[[Q, Caller], AsyncIterator[A]],
    *,
    taken_s: float | None = None,
) -> Handler:
    """Handle a method with one request.  The stream ends after the iterator's last item.

    The call ends if the caller needs more than ``taken_s`` to receive one item.  None means no limit.
    """

    async def serve(stream: HandlerStream, caller: Caller) -> None:
        await _send_all(stream, function(await _only_request(stream, method, caller), caller), taken_s)

    return Handler(method, serve)


def client_stream(
    method: ClientStreaming[Q, A], function: Callable[[AsyncIterator[Q], Caller], Awaitable[A]]
) -> Handler:
    """Handle a method with one response, which may be sent before the last request arrives."""

    async def serve(stream: HandlerStream, caller: Caller) -> None:
        async with aclosing(_requests(stream, method, caller)) as requests:
            reply = await function(requests, caller)
        await stream.send_message(reply)

    return Handler(method, serve)


def both_stream(
    method: BothStream[Q, A], function: Callable[[AsyncIterator[Q], Caller], AsyncIterator[A]]
) -> Handler:
    """Handle a method with requests and responses, where ``function`` yields responses while it reads requests."""

    async def serve(stream: HandlerStream, caller: Caller) -> None:
        async with aclosing(_requests(stream, method, caller)) as requests:
            await _send_all(stream, function(requests, caller))

    return Handler(method, serve)


def duplex(
    method: BothStream[Q, A],
    function: Callable[[AsyncIterator[Q], Callable[[A], Awaitable[None]], Caller], Awaitable[None]],
) -> Handler:
    """Handle a method like ``both_stream``, for a function that receives and sends at the same time.

    ``function`` gets the requests and a function that sends a response.  The stream ends when it returns.
    """

    async def serve(stream: HandlerStream, caller: Caller) -> None:
        await stream.send_initial_metadata()
        async with aclosing(_requests(stream, method, caller)) as requests:
            await function(requests, stream.send_message, caller)

    return Handler(method, serve)


async def run_handler(handler: Handler, stream: HandlerStream, caller: Caller) -> None:
    """Serve one call.  Every error becomes a status.  Raises CallFailed."""
    try:
        await handler.serve(stream, caller)
    except SkepError as error:
        raise to_status(error) from error
    except CallFailed:
        raise
    except TimeoutError as error:
        raise CallFailed(StatusCode.DEADLINE_EXCEEDED, "the call took too long") from error
    except LOST_PEER as error:
        raise CallFailed(StatusCode.UNAVAILABLE, "the peer closed the stream") from error
    except Exception as error:
        log.exception("call failed", method=handler.method.path, peer=caller.address)
        raise CallFailed(StatusCode.INTERNAL, "internal error") from error


async def _send_all(stream: HandlerStream, replies: AsyncIterator[A], taken_s: float | None = None) -> None:
    # Send the headers first, because a peer that waits for them would otherwise wait for the first reply.
    await stream.send_initial_metadata()
    try:
        async for reply in replies:
            async with asyncio.timeout(taken_s):
                await stream.send_message(reply)
            del reply  # the next item may take hours, in which this one would occupy memory
    finally:
        close = getattr(replies, "aclose", None)
        if close is not None:
            await close()


async def _only_request(stream: HandlerStream, method: Method[Q, Any], caller: Caller) -> Q:
    request = await _receive(stream, method, caller)
    if request is None:
        raise InvalidArgument("the request is missing")
    return request


async def _requests(stream: HandlerStream, method: Method[Q, Any], caller: Caller) -> AsyncGenerator[Q, None]:
    while (request := await _receive(stream, method, caller)) is not None:
        yield request
        del request  # likewise


async def _receive(stream: HandlerStream, method: Method[Q, Any], caller: Caller) -> Q | None:
    """Return the next request, or None after the last.

    The length arrives first, so no peer can make a manager buffer more than the limit.
    """
    limit = method.request_bytes_max
    if caller.identity is None:
        limit = min(limit, STRANGER_REQUEST_BYTES_MAX)
    try:
        prefix = await stream.recv_data(5)
        if not prefix:
            return None
        if prefix[0]:
            raise Unimplemented("compressed messages are not supported")
        length = int.from_bytes(prefix[1:], "big")
        if length > limit:
            raise ResourceExhausted(f"grpc: received message larger than max ({length} vs. {limit})")
        return method.request.FromString(await stream.recv_data(length, MESSAGE_SECONDS_MAX))
    except (DecodeError, AssertionError) as error:
        raise InvalidArgument("the message cannot be decoded") from error
