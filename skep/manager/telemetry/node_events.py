"""Events of the cluster and of all nodes' containers, images and volumes, in one stream.

A node numbers its events and keeps the latest ones.  For each client, a manager reads them through a tunnel, so nothing
is sent without a client.  The stream's cursor has the cursor of the cluster's events, then one for each node:
``INCARNATION-REVISION~NODE.LIFE.NUMBER~...``.  It covers the events that the client has received, so another stream can
resume after it at any manager.  If events are missing or a node cannot be read, a message in the stream says so.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import aclosing, contextmanager
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import urlencode

import msgspec
from msgspec.structs import replace

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.aio.failures import describe_error
from skep.aio.groups import errors_as_they_are, first_alone
from skep.errors import FailedPrecondition, InvalidArgument, ResourceExhausted, SkepError, Unavailable
from skep.manager.nodes.tunnels import NodeTunnels
from skep.manager.telemetry.events import Actor, EventMessage
from skep.model.networks.data_planes import is_docker_node
from skep.model.node import Node, NodeState
from skep.model.values.ids import NodeId
from skep.model.values.times import SECOND_NS
from skep.store.interface import View
from skep.wire.tunnel import Tunnel

NODES_MAX = 128
"""Largest number of nodes in one client's stream, because each node adds to every cursor."""
LINE_BYTES_MAX = 256 << 10
"""Longest line of an event in bytes.  A node replaces a longer event with a gap message."""
HEAD_BYTES_MAX = 64 << 10
"""Largest head of a node's response in bytes."""
SILENT_S_MAX = 30.0
"""Seconds without a line after which a node counts as silent.  A node sends a line at least every ten seconds."""
LAST_S = 5.0
"""Seconds for reading the nodes' past events once the requested end has come."""
_WAITING_MAX = 64
"""Largest number of nodes' messages that wait for one client."""
_LOOK_S = 1.0
"""Seconds between two checks for nodes that joined or returned."""
_KEY_LENGTH = 12
"""Characters of a node's id in a cursor.  They distinguish nodes and keep cursors short."""
TYPES = frozenset({"container", "image", "volume"})
ID, NAME = "com.docker.swarm.node.id", "node.name"
"""Attributes of a node's events."""


class EventLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of the clients that read node events from one manager."""

    nodes: int = NODES_MAX
    streams: int = 8
    """Maximum number of clients.  Each has a tunnel to every node."""
    takes_within_s: float = 60.0
    """Seconds after which a client that takes no event loses its stream to another client."""


LIMITS = EventLimits()


class StreamPosition(NamedTuple):
    """Position at which a stream resumes.

    It has the cursor of the cluster's events, and each node's cursor by the first characters of the node's id.
    """

    cluster: str = ""
    nodes: Mapping[str, str] = {}

    @classmethod
    def of(cls, text: str) -> "StreamPosition":
        """Parse a cursor.  Raises: InvalidArgument."""
        cluster, *parts = text.split("~")
        nodes: dict[str, str] = {}
        for part in parts:
            key, _, cursor = part.partition(".")
            if not (
                0 < len(key) <= _KEY_LENGTH and key.isalnum() and part.isascii() and 0 < len(cursor) < 40
            ):
                raise InvalidArgument(f"invalid cursor {text[:80]!r}: {part[:60]!r} is not a node's cursor")
            nodes[key] = cursor
        if len(nodes) > NODES_MAX:
            raise InvalidArgument(f"invalid cursor: it has more than {NODES_MAX} nodes")
        return cls(cluster, nodes)

    def __str__(self) -> str:
        return "~".join([self.cluster, *(f"{key}.{cursor}" for key, cursor in sorted(self.nodes.items()))])


class WantedEvents(msgspec.Struct, frozen=True):
    """A client's request.

    Args:
        names: Names or ids of nodes.  Empty for all.
        filters: Filters for the nodes, as JSON.
        begins_at: Cursor of the cluster's events, for messages before the first event.
        after: Position where an earlier stream ended.
    """

    names: Collection[str] = ()
    filters: str = ""
    since: str = ""
    until_ns: int | None = None
    begins_at: str = ""
    after: StreamPosition | None = None


class _Item(NamedTuple):
    """A queued message.  ``cursor``: position after it in the stream of ``node``, or in the cluster's stream if
    ``node`` is empty.
    """

    node: str
    cursor: str
    message: Mapping[str, Any] | EventMessage | None


class _Actor(msgspec.Struct):
    id: str = msgspec.field(name="ID")
    attributes: dict[str, str] = msgspec.field(name="Attributes")


class _Line(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The part of a node's event that is forwarded.  Clients must be able to read it and to return its cursor."""

    status: str = ""
    id: str = ""
    from_: str = msgspec.field(name="from", default="")
    type: Literal["container", "image", "volume", "stream"] = msgspec.field(name="Type")
    action: str = msgspec.field(name="Action")
    actor: _Actor = msgspec.field(name="Actor")
    scope: str = ""
    time_ns: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)] = msgspec.field(name="timeNano")
    cursor: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-zA-Z]{1,20}\.[0-9]{1,16}\Z")] = msgspec.field(
        name="Cursor"
    )


class AllEvents:
    """All streams of this manager that include events of nodes."""

    def __init__(
        self,
        tunnels: NodeTunnels,
        view: Callable[[], View],
        clock: Clock,
        limits: EventLimits = LIMITS,
    ) -> None:
        self._tunnels = tunnels
        self._view = view
        self._clock = clock
        self._limits = limits
        self._streams = 0

    async def stream(
        self,
        wanted: WantedEvents,
        cluster: Callable[[], AsyncGenerator[EventMessage, None]],
        send: Callable[[Mapping[str, Any] | EventMessage], Awaitable[None]],
    ) -> None:
        """Send the events, each with its cursor, until ``cluster``, the stream of the cluster's own events, ends.

        Raises:
            SkepError: The stream cannot start, or some events are lost.
            ConnectionResetError: The client reads nothing.
            Exception: Any error of ``send``.
        """
        self.check(wanted)
        given = wanted.after or StreamPosition()
        position = {**given.nodes}
        at = given.cluster or wanted.begins_at
        queue: asyncio.Queue[_Item | None] = asyncio.Queue(_WAITING_MAX)
        with self._counted():
            async with errors_as_they_are():
                with first_alone(SkepError):
                    async with asyncio.TaskGroup() as group:
                        nodes = group.create_task(
                            self._read_nodes(wanted, position, queue), name="events of nodes"
                        )
                        group.create_task(
                            self._read_cluster(cluster, queue, nodes), name="events of the cluster"
                        )
                        while (item := await queue.get()) is not None:
                            if not item.node:
                                at = item.cursor
                            elif item.cursor:
                                position[item.node] = item.cursor
                            if item.message is not None:
                                message = _with_cursor(item.message, str(StreamPosition(at, position)))
                                await _wait_taken(send(message), self._limits.takes_within_s)
                        nodes.cancel()

    def check(self, wanted: WantedEvents) -> None:
        """Check that a stream can start.  Raises: InvalidArgument, FailedPrecondition, ResourceExhausted."""
        nodes = self._nodes(wanted)
        known = {name for node in self._view().find(Node) for name in (node.id, node.description.hostname)}
        if missing := sorted(set(wanted.names) - known):
            raise InvalidArgument(f"node {missing[0]} not found")
        if len(nodes) > self._limits.nodes:
            raise FailedPrecondition(
                f"one stream can have the events of at most {self._limits.nodes} nodes, "
                f"not {len(nodes)}: name the nodes"
            )
        if self._streams >= self._limits.streams:
            raise ResourceExhausted(
                f"{self._limits.streams} clients already read node events from this manager: try another manager"
            )

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self._streams += 1
        try:
            yield
        finally:
            self._streams -= 1

    def _nodes(self, wanted: WantedEvents) -> list[Node]:
        found = [
            node
            for node in self._view().find(Node)
            if not wanted.names or {node.id, node.description.hostname} & set(wanted.names)
        ]
        return sorted(found, key=lambda node: node.id)

    async def _read_cluster(
        self,
        cluster: Callable[[], AsyncGenerator[EventMessage, None]],
        queue: asyncio.Queue[_Item | None],
        nodes: asyncio.Task[None],
    ) -> None:
        async with aclosing(cluster()) as messages:
            async for message in messages:
                await queue.put(_Item("", message.cursor, message))
        await asyncio.wait([nodes], timeout=LAST_S)  # read everything that the nodes have sent so far
        await queue.put(None)

    def _forget_gone(self, position: dict[str, str]) -> None:
        """Drop removed nodes from a position.  Otherwise cursors would grow until they are refused."""
        if gone := position.keys() - {id[:_KEY_LENGTH] for id in self._view().ids(Node)}:
            for key in gone:
                del position[key]

    # --- nodes ----------------------------------------------------------------------------------------------------

    async def _read_nodes(
        self, wanted: WantedEvents, position: dict[str, str], queue: asyncio.Queue[_Item | None]
    ) -> None:
        """Run a reader for each available node.  ``position`` grows while the stream runs."""
        begun_at = self._clock.monotonic()
        reading: dict[NodeId, asyncio.Task[None]] = {}
        away: set[NodeId] = set()
        async with asyncio.TaskGroup() as group:
            while True:
                self._forget_gone(position)
                reading = {id: task for id, task in reading.items() if not task.done()}
                for node in self._nodes(wanted):
                    if node.id in reading:
                        continue
                    why = _why_unread(node)
                    if not why and len(reading) >= self._limits.nodes:
                        why = f"the stream already has events of {self._limits.nodes} other nodes"
                    if why:
                        if node.id not in away:
                            away.add(node.id)
                            await queue.put(_notice("disconnect", node, why, position, self._clock.now_ns()))
                        continue
                    away.discard(node.id)
                    reader = _Reader(node, wanted, position, queue)
                    reading[node.id] = group.create_task(
                        self._read_node(reader, begun_at), name=f"events of {node.id}"
                    )
                until_ns = wanted.until_ns
                if until_ns is not None and until_ns <= self._clock.now_ns():
                    return  # once its readers have returned as well
                await self._clock.sleep(_LOOK_S)

    async def _read_node(self, reader: "_Reader", begun_at: float) -> None:
        """Read a node's events until it is unavailable.  The stream began at ``begun_at`` (monotonic seconds)."""
        backoff = Backoff(0.2, 10.0)
        is_away, node = False, reader.node
        while True:
            try:
                head = reader.head(self._clock.monotonic() - begun_at)
                async with self._tunnels.open_node(node, head) as tunnel, aclosing(_lines(tunnel)) as lines:
                    async for line in lines:
                        await reader.take(line)
                        is_away = False
                        backoff.reset()
                why = "the node ended its event stream"
            except (SkepError, TimeoutError, msgspec.DecodeError) as error:
                why = describe_error(error)
            if reader.is_over(self._clock.now_ns()):
                return
            present = self._view().lookup(Node, node.id)
            if present is None:
                return
            if not is_away:
                is_away = True
                await reader.put_notice("disconnect", why, self._clock.now_ns())
            if _why_unread(present):
                return
            await backoff.sleep(self._clock)


class _Reader:
    """Reads one node's events for one client."""

    def __init__(
        self,
        node: Node,
        wanted: WantedEvents,
        position: Mapping[str, str],
        queue: asyncio.Queue[_Item | None],
    ) -> None:
        self.node = node
        self._key = node.id[:_KEY_LENGTH]
        self._wanted = wanted
        self._queue = queue
        self._position = position
        self._cursor = position.get(self._key, "")
        self._is_known = False

    def head(self, age_s: float) -> bytes:
        """Return the request for the events after the last one.

        Without a cursor, the node sends all events since the stream started.  If an earlier stream is resumed, the node
        sends all events that it has.
        """
        query = {"filters": self._wanted.filters} if self._wanted.filters else {}
        if self._cursor:
            query["after"] = self._cursor
        elif self._wanted.since:
            query["since"] = self._wanted.since
        elif self._wanted.after is None:
            query["age"] = str(int(age_s))
        if self._wanted.until_ns is not None:
            query["until"] = f"{self._wanted.until_ns // SECOND_NS}.{self._wanted.until_ns % SECOND_NS:09d}"
        # HTTP/1.0, because the lines end with the connection and need no framing.
        return f"GET /events?{urlencode(query)} HTTP/1.0\r\nHost: node\r\n\r\n".encode()

    def is_over(self, now_ns: int) -> bool:
        """Return whether the requested end time has passed."""
        return self._wanted.until_ns is not None and self._wanted.until_ns <= now_ns

    async def take(self, line: bytes) -> None:
        """Queue an event line for the client.  Raises: msgspec.DecodeError: an invalid event."""
        known = _decoded(line)
        self._cursor = known.cursor
        if known.type == "stream":
            await self._take_mark(known)
            return
        known.actor.attributes |= {ID: self.node.id, NAME: self.node.description.hostname}
        message = msgspec.to_builtins(known)
        message |= {"scope": "swarm", "time": known.time_ns // SECOND_NS}
        await self._queue.put(_Item(self._key, self._cursor, message))

    async def _take_mark(self, known: _Line) -> None:
        if known.action == "gap":
            await self.put_notice("gap", "the node no longer has all events since then", known.time_ns)
        elif not self._is_known:
            await self.put_notice("connect", "", known.time_ns)
        else:
            await self._queue.put(_Item(self._key, self._cursor, None))
        self._is_known = True

    async def put_notice(self, action: str, reason: str, at_ns: int) -> None:
        """Queue a message that some of the node's events are missing, or that they cannot be read."""
        notice = _notice(action, self.node, reason, self._position, at_ns)
        await self._queue.put(notice._replace(cursor=self._cursor) if self._cursor else notice)


_decode = msgspec.json.Decoder(_Line).decode


def _decoded(line: bytes) -> _Line:
    """Decode an event line.  Raises: msgspec.DecodeError: an invalid event."""
    try:
        return _decode(line)
    except RecursionError as error:
        raise msgspec.ValidationError("the event is nested too deeply") from error


def _why_unread(node: Node) -> str:
    """Return why the node's events cannot be read, or an empty text if they can."""
    if is_docker_node(node):
        return "it is a Docker Engine, whose events are only available at its own API"
    if node.status.state is not NodeState.READY:
        return f"it is {node.status.state.value}"
    return ""


def _notice(action: str, node: Node, reason: str, position: Mapping[str, str], at_ns: int) -> _Item:
    attributes = {"name": node.description.hostname, "reason": reason}
    actor = Actor(id=node.id, attributes={name: value for name, value in attributes.items() if value})
    message = EventMessage(
        type="stream", action=action, actor=actor, time=at_ns // SECOND_NS, time_nano=at_ns
    )
    key = node.id[:_KEY_LENGTH]
    return _Item(key, position.get(key, ""), message)


async def _wait_taken(sending: Awaitable[None], within_s: float) -> None:
    try:
        async with asyncio.timeout(within_s):
            await sending
    except TimeoutError:
        raise ConnectionResetError(f"the client took no event for {within_s:g} s") from None


def _with_cursor(message: Mapping[str, Any] | EventMessage, cursor: str) -> Mapping[str, Any] | EventMessage:
    if isinstance(message, EventMessage):
        return replace(message, cursor=cursor)
    return {**message, "Cursor": cursor}


async def _lines(tunnel: Tunnel) -> AsyncGenerator[bytes, None]:
    """Yield the lines of a node's response.

    Raises:
        Unavailable: The response is invalid.
        TimeoutError: The node is silent.
    """
    rest = b""
    while b"\r\n\r\n" not in rest:
        rest += await _piece(tunnel)
        if len(rest) > HEAD_BYTES_MAX:
            raise Unavailable("the node's response head is too long")
    head, _, rest = rest.partition(b"\r\n\r\n")
    status = head.split(b" ", 2)[1:2]
    if status != [b"200"]:
        raise Unavailable(f"the node refused the request: {rest[:500].decode(errors='replace')}")
    while True:
        *lines, rest = rest.split(b"\n")
        for line in lines:
            yield line
        if len(rest) > LINE_BYTES_MAX:
            raise Unavailable("an event of the node is too long")
        data = await _piece(tunnel, may_end=True)
        if not data:
            return
        rest += data


async def _piece(tunnel: Tunnel, *, may_end: bool = False) -> bytes:
    async with asyncio.timeout(SILENT_S_MAX):
        data = await tunnel.read()
    if not data and not may_end:
        raise Unavailable("the node sent no response")
    return data
