"""The simulated network: calls between nodes and managers, with the real messages and handlers, without sockets.

``MemoryChannel`` has the methods of ``wire.client.Channel``.  Messages are encoded and framed as on a connection, and
errors are sent as statuses.  Each message takes the network's latency, and the order is kept.  Connections end with
their listener.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from contextlib import asynccontextmanager
from typing import Any, Generic, TypeVar

import msgspec
from google.protobuf.message import Message

from sim.world.links import Links, Machine
from skep.errors import SkepError, Unavailable, Unimplemented
from skep.manager.notify import messages
from skep.manager.notify.outbox import Send, skip_sending
from skep.manager.notify.records import Target
from skep.manager.queries.board import AskedQuery
from skep.model.measures.queries import QueryFailed
from skep.model.measures.readings import IdleReports, IdleTimes
from skep.model.values.ids import NodeId
from skep.rpc.errors import from_status
from skep.rpc.status import CallFailed
from skep.security.identity import NodeIdentity
from skep.wire.access import Caller
from skep.wire.client import CONNECT_SECONDS_MAX
from skep.wire.methods import Method, UnaryMethod
from skep.wire.service import Handler, run_handler

T = TypeVar("T")
Q = TypeVar("Q", bound=Message)
A = TypeVar("A", bound=Message)

FIRST_RESEND_S = 1.0
"""TCP's first timeout of a SYN."""
GAP_S = 1e-6
"""Time between two arrivals in one direction, so that the end of a call is processed after its messages."""
IN_FLIGHT_MAX = 100_000
"""Limit of unread messages of one stream.  If there are more, its reader is stuck, which is a bug."""


class _End(msgspec.Struct, frozen=True):
    """The end of a stream.  ``error``: the reason, or None for a regular end."""

    error: SkepError | None = None


class _Pipe(Generic[T]):
    """One direction of a stream: ordered, and delayed while the direction is cut."""

    def __init__(self, direction: "Direction") -> None:
        self._direction = direction
        self._in_flight: deque[T | _End] = deque()
        self._arrived: deque[T | _End] = deque()
        self._ready = asyncio.Event()

    def put(self, item: T | _End) -> None:
        assert len(self._in_flight) + len(self._arrived) < IN_FLIGHT_MAX, "a reader is stuck"
        self._in_flight.append(item)
        self._direction.carry(self._arrive)

    def drop(self, end: _End) -> None:
        """End the stream.  Messages in flight are lost."""
        self._in_flight.clear()
        self._arrived.append(end)
        self._ready.set()

    async def get(self) -> T | None:
        """Return the next item, or None after the last.  Raises: the error that ended the stream, also on all further
        calls.
        """
        while not self._arrived:
            self._ready.clear()
            await self._ready.wait()
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
            self._ready.set()


class Direction:
    """Messages from one machine to another.  They arrive later, in order, and wait while the direction is cut."""

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
        """Send the waiting messages if the direction is not cut.  Return whether that was possible."""
        if not self._network.links.reaches(self._source, self._target):
            return False
        held, self._held = self._held, deque()
        for arrive in held:
            self.carry(arrive)
        return True


def steady_figure(asked: AskedQuery, now: float) -> float | None:
    """Return a number that depends on the minute.  A host whose name is ``flaky`` fails in every third minute."""
    minute = int(now // 60)
    return None if asked.query.host == "flaky" and minute % 3 == 2 else float(10 * (minute % 5))


class Network:
    """The listeners, and the latency of messages."""

    def __init__(self, loop: asyncio.AbstractEventLoop, links: Links, latency_s: float = 0.0005) -> None:
        self.loop = loop
        self.links = links
        self.latency_s = latency_s
        self.slow: dict[Machine, float] = {}
        """Additional latency of a machine's messages, in seconds."""
        self.accepts: Callable[[Machine, Machine], bool] = lambda source, target: True
        """Whether both ends of a new connection trust each other's certificates."""
        self.idle_at: Callable[[NodeId], IdleTimes | None] = lambda _: None
        """Returns the idle times at a node's front door, or None if the node does not answer."""
        self.figure: Callable[[AskedQuery, float], float | None] = steady_figure
        """Returns the figure of a query at a time, or None if it fails."""
        self.receive_notification: Send = skip_sending
        """The target of the managers' notifications."""
        self.outside: dict[Machine, str] = {}
        """Addresses under which others see machines behind NAT.  They can open connections, and nobody to them."""
        self.dialed_in_vain: list[tuple[Machine, Machine]] = []
        """Connections that were tried to machines behind NAT, which is an error of whoever tries."""
        self.held: HeldDirections = HeldDirections()
        self._listeners: dict[str, Listener] = {}
        self._channels: dict[MemoryChannel, tuple[Machine, Machine]] = {}
        links.changed.append(self.held.flush)

    async def notify(self, target: Target, message: messages.Message) -> str:
        """Deliver a notification to the present receiver."""
        return await self.receive_notification(target, message)

    async def ask_doors(self, nodes: Collection[NodeId]) -> IdleReports:
        """Return the idle times at the front doors of nodes that a manager asks."""
        await asyncio.sleep(2 * self.latency_s)
        return {id: found for id in nodes if (found := self.idle_at(id)) is not None}

    async def ask(self, asked: AskedQuery) -> float:
        """Answer a query of a manager."""
        await asyncio.sleep(self.latency_s)
        figure = self.figure(asked, self.loop.time())
        if figure is None:
            raise QueryFailed("connection refused")
        return figure

    def delay_s(self, source: Machine, target: Machine) -> float:
        """Return the current latency of a message."""
        if not self.slow:
            return self.latency_s
        return self.latency_s + self.slow.get(source, 0.0) + self.slow.get(target, 0.0)

    @asynccontextmanager
    async def listening(self, address: str, handlers: Iterable[Handler]) -> AsyncIterator[None]:
        """Serve calls to ``address`` within the context.  Leaving it breaks every connection."""
        async with asyncio.TaskGroup() as group:
            listener = self._listeners[address] = Listener(handlers, group)
            try:
                yield
            finally:
                # Keep the listener of a process that has already replaced a killed process.
                if self._listeners[address] is listener:
                    del self._listeners[address]
                listener.close()

    @asynccontextmanager
    async def connect(
        self, address: str, identity: NodeIdentity, *, timeout_s: float = CONNECT_SECONDS_MAX
    ) -> "AsyncIterator[MemoryChannel]":
        """Connect to ``address``.  Raises: Unavailable: refused, not trusted, or no handshake in time."""
        source, target = identity.node_id, address.partition(":")[0]
        try:
            async with asyncio.timeout(timeout_s):
                await self._wait_handshake(source, target)
        except TimeoutError as error:
            raise Unavailable(f"{address}: connection timed out") from error
        listener = self._listeners.get(address)
        if listener is None:
            if target in self.outside:
                self.dialed_in_vain.append((source, target))
            raise Unavailable(f"{address}: connection refused")
        if not self.accepts(source, target):
            raise Unavailable(f"{address}: certificate not trusted")
        listener.seen[source] = self.outside.get(source, "127.0.0.1")
        channel = MemoryChannel(
            address, listener, identity, Direction(self, source, target), Direction(self, target, source)
        )
        self._channels[channel] = source, target
        try:
            yield channel
        finally:
            del self._channels[channel]
            channel.close()

    def reset_connections(self, machine: Machine) -> None:
        """Break every connection of ``machine``.  New ones can be made at once."""
        for channel, ends in list(self._channels.items()):
            if machine in ends:
                channel.close()

    async def _wait_handshake(self, source: Machine, target: Machine) -> None:
        """Return after a TCP handshake.  Lost packets are sent again, with exponential backoff."""
        wait_s = FIRST_RESEND_S
        while not self.links.is_joined(source, target):
            await asyncio.sleep(wait_s)
            wait_s *= 2
        await asyncio.sleep(2 * self.delay_s(source, target))


class HeldDirections:
    """Directions with waiting messages, in the order in which they began to wait."""

    def __init__(self) -> None:
        self._directions: dict[Direction, None] = {}

    def add(self, direction: Direction) -> None:
        self._directions[direction] = None

    def flush(self) -> None:
        """Send the waiting messages of all directions that are not cut."""
        for direction in list(self._directions):
            del self._directions[direction]
            if not direction.flush():
                self._directions[direction] = None


class Listener:
    """The server side of all connections of one manager."""

    def __init__(self, handlers: Iterable[Handler], group: asyncio.TaskGroup) -> None:
        self.handlers = {handler.method.path: handler for handler in handlers}
        self._group = group
        self.seen: dict[Machine, str] = {}
        """The address from which each machine connects."""
        self._handling: set[asyncio.Task[None]] = set()
        self.is_closed = False

    def handle(self, handler: Handler, stream: "_ServerStream", caller: Caller) -> asyncio.Task[None]:
        """Run the handler of one call.  An error of the handler ends the stream."""
        task = self._group.create_task(_serve(handler, stream, caller), name=handler.method.path)
        self._handling.add(task)
        task.add_done_callback(self._handling.discard)
        return task

    def close(self) -> None:
        """Break all connections."""
        self.is_closed = True
        for task in sorted(self._handling, key=lambda task: task.get_name()):
            task.cancel()


class MemoryChannel:
    """The client side of a connection, with the methods of ``wire.client.Channel``."""

    def __init__(
        self, address: str, listener: Listener, identity: NodeIdentity, up: Direction, down: Direction
    ) -> None:
        self.address = address
        self.peer = NodeId("")
        self._listener = listener
        self._up = up
        self._down = down
        came_from = listener.seen.get(identity.node_id, "127.0.0.1")
        self._caller = Caller(identity=identity, address=came_from, disconnect=self._disconnect)
        self._open: dict[int, _OpenCall] = {}
        self._streams = 0
        self._is_lost = False

    async def call(self, method: UnaryMethod[Q, A], request: Q, *, timeout_s: float = 5.0) -> A:
        """Send a request and return the response.  Raises: Unavailable: no response in time, or the error in the
        response.
        """
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
        """Open a streaming call.  Leaving the context abandons it."""
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
        """Break the connection from the client side.  Its calls end with ``Unavailable``."""
        self._is_lost = True
        for opened in self._open.values():
            opened.down.drop(_End(self._lost()))
            self._up.carry(opened.abandon)
        self._open.clear()

    def _begin(self, method: Method[Q, A], opened: "_OpenCall") -> None:
        """Start the handler when the call has arrived at the listener."""
        handler = self._listener.handlers.get(method.path)
        if self._listener.is_closed or opened.is_abandoned:
            opened.down.put(_End(self._lost()))
        elif handler is None:
            opened.down.put(_End(Unimplemented(f"unknown method {method.path}")))
        else:
            opened.task = self._listener.handle(handler, _ServerStream(opened.up, opened.down), self._caller)

    def _disconnect(self) -> None:
        """Break the connection from the server side."""
        self._is_lost = True
        for opened in self._open.values():
            opened.abandon()
            end, down = _End(self._lost()), opened.down
            self._down.carry(lambda down=down, end=end: down.drop(end))  # type: ignore[misc]

    def _lost(self) -> Unavailable:
        return Unavailable(f"{self.address}: connection lost")


class _OpenCall:
    """The state of one call that both sides share."""

    def __init__(self, up: _Pipe[bytes], down: _Pipe[bytes]) -> None:
        self.up = up
        self.down = down
        self.task: asyncio.Task[None] | None = None
        self.is_abandoned = False

    def abandon(self) -> None:
        """Cancel the call on the server side."""
        self.is_abandoned = True
        if self.task is not None:
            self.task.cancel()


class MemoryCall(Generic[Q, A]):
    """One open streaming call, with the methods of ``wire.client.Call``."""

    def __init__(self, method: Method[Q, A], up: _Pipe[bytes], down: _Pipe[bytes]) -> None:
        self._method = method
        self._up = up
        self._down = down

    async def send(self, message: Q, *, end: bool = False) -> None:
        """Send one message.  ``end``: whether it is the last one."""
        self._up.put(message.SerializeToString())
        if end:
            self._up.put(_End())

    async def receive(self) -> A | None:
        """Return the next message, or None after the last.  Raises: the error that the peer sent instead."""
        data = await self._down.get()
        return None if data is None else self._method.reply.FromString(data)

    async def __aiter__(self) -> AsyncIterator[A]:
        while (message := await self.receive()) is not None:
            yield message


class _ServerStream:
    """The stream passed to handlers.  Stands for ``rpc.server.ServerStream``."""

    def __init__(self, up: _Pipe[bytes], down: _Pipe[bytes]) -> None:
        self.down = down
        self._up = up
        self._unread = b""

    async def recv_data(self, length: int, within_s: float | None = None) -> bytes:
        """Return bytes of the framed requests, as from a connection.  Empty after the last."""
        if not self._unread:
            data = await self._up.get()
            if data is None:
                return b""
            self._unread = b"\0" + len(data).to_bytes(4, "big") + data
        part, self._unread = self._unread[:length], self._unread[length:]
        return part

    async def send_initial_metadata(self) -> None:
        """Do nothing, because headers are not simulated."""

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
