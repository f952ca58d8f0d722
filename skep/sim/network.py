"""The simulated network: calls between nodes and managers, with the real messages and handlers, without sockets.

``MemoryChannel`` has the calls of ``wire.client.Channel``; what it carries is encoded and framed as on a connection,
errors travel as statuses.  Each message takes the network's latency; order is kept.  A listener that goes takes
its connections with it.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any, Generic, TypeVar

import msgspec
from google.protobuf.message import Message
from grpclib.exceptions import GRPCError

from skep.errors import SkepError, Unavailable, Unimplemented
from skep.security.identity import Identity
from skep.wire.access import Caller
from skep.wire.errors import from_status
from skep.wire.methods import Method, Unary
from skep.wire.service import Handler, run_handler

T = TypeVar("T")
Q = TypeVar("Q", bound=Message)
A = TypeVar("A", bound=Message)

IN_FLIGHT_MAX = 100_000
"""Messages of one stream that nobody has read: more means that a reader is stuck, which is a bug."""


class _End(msgspec.Struct, frozen=True):
    """Nothing follows; ``error``: why, if not because all was said."""

    error: SkepError | None = None


class _Pipe(Generic[T]):
    """One direction of a stream."""

    def __init__(self, latency_s: float) -> None:
        self._latency_s = latency_s
        self._in_flight: deque[T | _End] = deque()
        self._arrived: deque[T | _End] = deque()
        self._news = asyncio.Event()

    def put(self, item: T | _End) -> None:
        assert len(self._in_flight) + len(self._arrived) < IN_FLIGHT_MAX, "a reader is stuck"
        self._in_flight.append(item)
        asyncio.get_running_loop().call_later(self._latency_s, self._arrive)

    async def get(self) -> T | None:
        """The next item, None after the last.  Raises what ended the stream; again for each further call."""
        while not self._arrived:
            self._news.clear()
            await self._news.wait()
        item = self._arrived[0]
        if isinstance(item, _End):
            if item.error is not None:
                raise item.error
            return None
        self._arrived.popleft()
        return item

    def _arrive(self) -> None:
        self._arrived.append(self._in_flight.popleft())
        self._news.set()


class Network:
    """Who listens where."""

    def __init__(self, latency_s: float = 0.0005) -> None:
        self.latency_s = latency_s
        self._listeners: dict[str, Listener] = {}

    @asynccontextmanager
    async def listening(self, address: str, handlers: Iterable[Handler]) -> AsyncIterator[None]:
        """Answer calls to ``address`` within the context; leaving it breaks every connection."""
        async with asyncio.TaskGroup() as group:
            listener = self._listeners[address] = Listener(handlers, group)
            try:
                yield
            finally:
                del self._listeners[address]
                listener.close()

    @asynccontextmanager
    async def connected(self, address: str, identity: Identity) -> "AsyncIterator[MemoryChannel]":
        """A connection to ``address``.  Raises: Unavailable: nobody listens there."""
        await asyncio.sleep(2 * self.latency_s)
        listener = self._listeners.get(address)
        if listener is None:
            raise Unavailable(f"{address}: connection refused")
        channel = MemoryChannel(address, listener, identity, self.latency_s)
        try:
            yield channel
        finally:
            channel.close()


class Listener:
    """One manager's end of all its connections."""

    def __init__(self, handlers: Iterable[Handler], group: asyncio.TaskGroup) -> None:
        self.handlers = {handler.method.path: handler for handler in handlers}
        self._group = group
        self._answering: set[asyncio.Task[None]] = set()
        self._is_closed = False

    def answer(self, handler: Handler, stream: "_ServerStream", caller: Caller) -> asyncio.Task[None]:
        """Answer one call; what the handler raises ends the stream.  Raises: Unavailable: it is closed."""
        if self._is_closed:
            raise Unavailable("connection lost")
        task = self._group.create_task(_serve(handler, stream, caller), name=handler.method.path)
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)
        return task

    def close(self) -> None:
        """Break everything that is open."""
        self._is_closed = True
        for task in sorted(self._answering, key=lambda task: task.get_name()):
            task.cancel()


class MemoryChannel:
    """A node's end of one connection; has the calls of ``wire.client.Channel``."""

    def __init__(self, address: str, listener: Listener, identity: Identity, latency_s: float) -> None:
        self.address = address
        self._listener = listener
        self._latency_s = latency_s
        self._caller = Caller(identity=identity, address="127.0.0.1", disconnect=self.close)
        self._open: dict[int, tuple[asyncio.Task[None], _Pipe[Any]]] = {}
        self._streams = 0

    async def call(self, method: Unary[Q, A], request: Q, *, timeout_s: float = 5.0) -> A:
        """Raises: Unavailable: no answer in time; otherwise what the manager answered."""
        try:
            async with asyncio.timeout(timeout_s), self.stream(method) as call:
                await call.send(request, end=True)
                reply = await call.receive()
        except TimeoutError as error:
            raise Unavailable(f"{self.address} did not answer in time") from error
        assert reply is not None
        return reply

    @asynccontextmanager
    async def stream(self, method: Method[Q, A]) -> "AsyncIterator[MemoryCall[Q, A]]":
        """A streaming call; leaving the context abandons it."""
        handler = self._listener.handlers.get(method.path)
        if handler is None:
            raise Unimplemented(f"unknown method {method.path}")
        up: _Pipe[bytes] = _Pipe(self._latency_s)
        down: _Pipe[bytes] = _Pipe(self._latency_s)
        number = self._streams = self._streams + 1
        task = self._listener.answer(handler, _ServerStream(up, down), self._caller)
        self._open[number] = task, down
        try:
            yield MemoryCall(method, up, down)
        finally:
            self._open.pop(number, None)
            task.cancel()

    def close(self) -> None:
        """Break the connection: its calls end as lost."""
        for task, down in self._open.values():
            down.put(_End(Unavailable(f"{self.address}: connection lost")))
            task.cancel()
        self._open.clear()


class MemoryCall(Generic[Q, A]):
    """One open streaming call; has the calls of ``wire.client.Call``."""

    def __init__(self, method: Method[Q, A], up: _Pipe[bytes], down: _Pipe[bytes]) -> None:
        self._method = method
        self._up = up
        self._down = down

    async def send(self, message: Q, *, end: bool = False) -> None:
        """Send one message.  ``end``: it is the last one."""
        self._up.put(message.SerializeToString())
        if end:
            self._up.put(_End())

    async def receive(self) -> A | None:
        """The next message, or None after the last.  Raises what the peer answered instead."""
        data = await self._down.get()
        return None if data is None else self._method.reply.FromString(data)

    async def __aiter__(self) -> AsyncIterator[A]:
        while (message := await self.receive()) is not None:
            yield message


class _ServerStream:
    """What handlers see of a stream; stands for ``grpclib.server.Stream``."""

    def __init__(self, up: _Pipe[bytes], down: _Pipe[bytes]) -> None:
        self.down = down
        self._up = up
        self._unread = b""
        self._stream = self

    async def recv_data(self, length: int) -> bytes:
        """Bytes of the framed requests, as they come from a connection; empty after the last."""
        if not self._unread:
            data = await self._up.get()
            if data is None:
                return b""
            self._unread = b"\0" + len(data).to_bytes(4, "big") + data
        part, self._unread = self._unread[:length], self._unread[length:]
        return part

    async def send_initial_metadata(self) -> None:
        """There are no headers."""

    async def send_message(self, message: Message) -> None:
        self.down.put(message.SerializeToString())


async def _serve(handler: Handler, stream: Any, caller: Caller) -> None:
    end = _End(Unavailable("connection lost"))
    try:
        await run_handler(handler, stream, caller)
        end = _End()
    except GRPCError as error:
        end = _End(from_status(error))
    finally:
        stream.down.put(end)
