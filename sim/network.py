"""The simulated network: calls between nodes and managers, with the real messages and handlers, without sockets.

``MemoryChannel`` has the calls of ``wire.client.Channel``; what it carries is encoded and framed as on a connection,
errors travel as statuses.  Each message takes the network's latency; order is kept.  A listener that goes takes
its connections with it.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any, Generic, TypeVar

import msgspec
from google.protobuf.message import Message

from sim.links import Links, Machine
from skep.errors import SkepError, Unavailable, Unimplemented
from skep.rpc.status import CallFailed
from skep.security.identity import Identity
from skep.wire.access import Caller
from skep.wire.client import CONNECT_SECONDS_MAX
from skep.wire.errors import from_status
from skep.wire.methods import Method, Unary
from skep.wire.service import Handler, run_handler

T = TypeVar("T")
Q = TypeVar("Q", bound=Message)
A = TypeVar("A", bound=Message)

FIRST_RESEND_S = 1.0
"""TCP's first wait for an answer to a SYN."""
GAP_S = 1e-6
"""Between two things that arrive on one way: what ends a call comes after what the call said, and that was heard."""
IN_FLIGHT_MAX = 100_000
"""Messages of one stream that nobody has read: more means that a reader is stuck, which is a bug."""


class _End(msgspec.Struct, frozen=True):
    """Nothing follows; ``error``: why, if not because all was said."""

    error: SkepError | None = None


class _Pipe(Generic[T]):
    """One direction of a stream: in order, and held up for as long as the way is cut."""

    def __init__(self, way: "Way") -> None:
        self._way = way
        self._in_flight: deque[T | _End] = deque()
        self._arrived: deque[T | _End] = deque()
        self._news = asyncio.Event()

    def put(self, item: T | _End) -> None:
        assert len(self._in_flight) + len(self._arrived) < IN_FLIGHT_MAX, "a reader is stuck"
        self._in_flight.append(item)
        self._way.carry(self._arrive)

    def drop(self, end: _End) -> None:
        """The connection is gone, and with it what was under way."""
        self._in_flight.clear()
        self._arrived.append(end)
        self._news.set()

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
        if self._in_flight:
            self._arrived.append(self._in_flight.popleft())
            self._news.set()


class Way:
    """From one machine to another: what is sent arrives later, in order, once the way is open."""

    def __init__(self, network: "Network", source: Machine, target: Machine) -> None:
        self._network = network
        self._source = source
        self._target = target
        self._held: deque[Callable[[], None]] = deque()
        self._free_at = 0.0

    def carry(self, arrive: Callable[[], None]) -> None:
        """Call ``arrive`` at the other end."""
        if self._held or not self._network.links.reaches(self._source, self._target):
            self._held.append(arrive)
            self._network.held.add(self)
        else:
            loop = self._network.loop
            delay_s = self._network.delay_s(self._source, self._target)
            self._free_at = max(self._free_at + GAP_S, loop.time() + delay_s)
            loop.call_at(self._free_at, arrive)

    def flush(self) -> bool:
        """Send on what was held up, if the way is open; gives whether it is."""
        if not self._network.links.reaches(self._source, self._target):
            return False
        held, self._held = self._held, deque()
        for arrive in held:
            self.carry(arrive)
        return True


class Network:
    """Who listens where, and how long messages take."""

    def __init__(self, loop: asyncio.AbstractEventLoop, links: Links, latency_s: float = 0.0005) -> None:
        self.loop = loop
        self.links = links
        self.latency_s = latency_s
        self.slow: dict[Machine, float] = {}
        """Machines whose messages take so many seconds longer."""
        self.held: WaySet = WaySet()
        self._listeners: dict[str, Listener] = {}
        self._channels: dict[MemoryChannel, tuple[Machine, Machine]] = {}
        links.changed.append(self.held.flush)

    def delay_s(self, source: Machine, target: Machine) -> float:
        """How long a message takes now."""
        if not self.slow:
            return self.latency_s
        return self.latency_s + self.slow.get(source, 0.0) + self.slow.get(target, 0.0)

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
    async def connected(
        self, address: str, identity: Identity, *, timeout_s: float = CONNECT_SECONDS_MAX
    ) -> "AsyncIterator[MemoryChannel]":
        """A connection to ``address``.  Raises: Unavailable: nobody listens there, or no packet arrives in time."""
        source, target = identity.node_id, address.partition(":")[0]
        try:
            async with asyncio.timeout(timeout_s):
                await self._shaken_hands(source, target)
        except TimeoutError as error:
            raise Unavailable(f"{address}: connection timed out") from error
        listener = self._listeners.get(address)
        if listener is None:
            raise Unavailable(f"{address}: connection refused")
        channel = MemoryChannel(
            address, listener, identity, Way(self, source, target), Way(self, target, source)
        )
        self._channels[channel] = source, target
        try:
            yield channel
        finally:
            del self._channels[channel]
            channel.close()

    def reset_connections(self, machine: Machine) -> None:
        """Every connection from and to ``machine`` breaks; new ones can be made at once."""
        for channel, ends in list(self._channels.items()):
            if machine in ends:
                channel.close()

    async def _shaken_hands(self, source: Machine, target: Machine) -> None:
        """Return when both have heard each other: what got lost is sent again, later and later."""
        wait_s = FIRST_RESEND_S
        while not self.links.is_joined(source, target):
            await asyncio.sleep(wait_s)
            wait_s *= 2
        await asyncio.sleep(2 * self.delay_s(source, target))


class WaySet:
    """Ways that hold something, in the order in which they began to."""

    def __init__(self) -> None:
        self._ways: dict[Way, None] = {}

    def add(self, way: Way) -> None:
        self._ways[way] = None

    def flush(self) -> None:
        """Send on whatever can be."""
        for way in list(self._ways):
            del self._ways[way]
            if not way.flush():
                self._ways[way] = None


class Listener:
    """One manager's end of all its connections."""

    def __init__(self, handlers: Iterable[Handler], group: asyncio.TaskGroup) -> None:
        self.handlers = {handler.method.path: handler for handler in handlers}
        self._group = group
        self._answering: set[asyncio.Task[None]] = set()
        self.is_closed = False

    def answer(self, handler: Handler, stream: "_ServerStream", caller: Caller) -> asyncio.Task[None]:
        """Answer one call; what the handler raises ends the stream."""
        task = self._group.create_task(_serve(handler, stream, caller), name=handler.method.path)
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)
        return task

    def close(self) -> None:
        """Break everything that is open."""
        self.is_closed = True
        for task in sorted(self._answering, key=lambda task: task.get_name()):
            task.cancel()


class MemoryChannel:
    """One machine's end of a connection to another; has the calls of ``wire.client.Channel``."""

    def __init__(self, address: str, listener: Listener, identity: Identity, up: Way, down: Way) -> None:
        self.address = address
        self._listener = listener
        self._up = up
        self._down = down
        self._caller = Caller(identity=identity, address="127.0.0.1", disconnect=self._disconnect)
        self._open: dict[int, _OpenCall] = {}
        self._streams = 0
        self._is_lost = False

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
        if self._is_lost:
            raise self._lost()
        opened = _OpenCall(_Pipe(self._up), _Pipe(self._down))
        number = self._streams = self._streams + 1
        self._open[number] = opened
        self._up.carry(lambda: self._begin(method, opened))
        try:
            yield MemoryCall(method, opened.up, opened.down)
        finally:
            self._open.pop(number, None)
            self._up.carry(opened.abandon)

    def close(self) -> None:
        """Break the connection from this end: its calls end as lost."""
        self._is_lost = True
        for opened in self._open.values():
            opened.down.drop(_End(self._lost()))
            self._up.carry(opened.abandon)
        self._open.clear()

    def _begin(self, method: Method[Q, A], opened: "_OpenCall") -> None:
        """The call has arrived at the listener."""
        handler = self._listener.handlers.get(method.path)
        if self._listener.is_closed or opened.is_abandoned:
            opened.down.put(_End(self._lost()))
        elif handler is None:
            opened.down.put(_End(Unimplemented(f"unknown method {method.path}")))
        else:
            opened.task = self._listener.answer(handler, _ServerStream(opened.up, opened.down), self._caller)

    def _disconnect(self) -> None:
        """The listener breaks the connection."""
        self._is_lost = True
        for opened in self._open.values():
            opened.abandon()
            end, down = _End(self._lost()), opened.down
            self._down.carry(lambda down=down, end=end: down.drop(end))  # type: ignore[misc]

    def _lost(self) -> Unavailable:
        return Unavailable(f"{self.address}: connection lost")


class _OpenCall:
    """One call on a connection, as both ends see it."""

    def __init__(self, up: _Pipe[bytes], down: _Pipe[bytes]) -> None:
        self.up = up
        self.down = down
        self.task: asyncio.Task[None] | None = None
        self.is_abandoned = False

    def abandon(self) -> None:
        """The listener need not answer any more."""
        self.is_abandoned = True
        if self.task is not None:
            self.task.cancel()


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
    """What handlers see of a stream; stands for ``rpc.server.ServerStream``."""

    def __init__(self, up: _Pipe[bytes], down: _Pipe[bytes]) -> None:
        self.down = down
        self._up = up
        self._unread = b""

    async def recv_data(self, length: int, within_s: float | None = None) -> bytes:
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
    except CallFailed as error:
        end = _End(from_status(error))
    finally:
        stream.down.put(end)
