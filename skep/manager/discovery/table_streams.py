"""Streams of tables to this manager's nodes.

A stream keeps only the last revision sent for each network, and each message is the change from there to the current
table.  So a slow reader gets fewer messages and nothing twice.
"""

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from weakref import WeakKeyDictionary

from skep.aio.clock import Clock
from skep.aio.event import Event
from skep.aio.time_slices import TimeSlices
from skep.errors import Unavailable
from skep.manager.discovery.network_tables import AffectedStreams
from skep.manager.discovery.state import DiscoveryState
from skep.manager.discovery.versioned_table import VersionedTable
from skep.manager.nodes.node_session import NodeSession, StreamWaker
from skep.manager.nodes.node_streams import NodeStream, NodeStreams, run_stream, session_named
from skep.model.values.ids import NetworkId, NodeId
from skep.store.interface import Store
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire.access import Caller
from skep.wire.convert.tables import messages_of, pieces_of
from skep.wire.service import Handler, duplex

PAUSE_S = 0.01
"""Changes within this number of seconds are sent together."""

LARGE_PIECES = 2
"""A message with more pieces counts as large."""
LARGE_AT_ONCE = 8
"""Maximum large messages sent at the same time.

A thousand nodes that connect at once would otherwise need a thousand copies of a table."""
SET_SECONDS_MAX = 60.0
"""Seconds within which a node must read a set of messages."""

Send = Callable[[skep.NetworkTables], Awaitable[None]]


class TableStreams:
    """Streams to the nodes with a session here."""

    def __init__(
        self,
        store: Store,
        state: DiscoveryState,
        session: Callable[[NodeId, str], NodeSession],
        clock: Clock,
        is_loaded: Event,
    ) -> None:
        """Create streams that send once ``is_loaded`` is set.

        Args:
            session: Returns a node's session here by its id, or raises SkepError.
        """
        self._store = store
        self._state = state
        self._session = session
        self._clock = clock
        self._is_loaded = is_loaded
        self._encoder = Encoder(clock)
        self._large = asyncio.Semaphore(LARGE_AT_ONCE)
        self._streams: NodeStreams[_Stream] = NodeStreams("tables")

    def services(self) -> Sequence[Handler]:
        """Return the handlers for ``wire.server.serve``."""
        return (duplex(methods.NETWORKS, self._networks),)

    def wake_all(self) -> None:
        """Wake every stream: the tables were loaded again."""
        for stream in self._streams.values():
            stream.signal.wake()

    def wake(self, affected: AffectedStreams) -> None:
        """Wake the streams that have something to send."""
        if affected.all_nodes:
            woken = set(self._streams)
        else:
            woken = {id for id in affected.nodes if id in self._streams}
            for network_id in affected.networks:
                nodes = self._state.tables.nodes_on(network_id)
                woken.update(self._streams if nodes is None else (id for id in nodes if id in self._streams))
        for node_id in sorted(woken):
            self._streams[node_id].signal.wake()

    async def _networks(
        self, requests: AsyncIterator[skep.AppliedTables], send: Send, caller: Caller
    ) -> None:
        session = self._session(caller.node_id, await session_named(requests))
        with (
            session.signal() as signal,
            self._streams.open(_Stream(caller.node_id, session, signal)) as stream,
        ):
            self._state.acknowledgements.reset_node(caller.node_id)
            await run_stream(
                stream, requests, partial(self._on_applied, stream), self._send_changes(stream, send)
            )

    def _on_applied(self, stream: "_Stream", request: skep.AppliedTables) -> None:
        """Record the tables that the node has applied."""
        for network_id, sent in stream.sent.items() if stream.error is None else ():
            if network_id in request.revisions:
                # A node cannot acknowledge more than it was sent.
                applied = min(request.revisions[network_id], sent)
                self._state.acknowledgements.applied(stream.node_id, network_id, applied)

    async def _send_changes(self, stream: "_Stream", send: Send) -> None:
        """Send everything, then changes, until the session ends."""
        await self._wait_for_session(stream)
        is_complete = True
        while True:
            tables = self._state.tables
            wanted = tables.networks_of(stream.node_id)
            removed = sorted(stream.sent.keys() - set(wanted))
            updates = [
                (id, stream.sent.get(id))
                for id in wanted
                if tables.tables[id].has_changed_since(stream.sent.get(id))
            ]
            self._state.count(stream.node_id)  # before it can acknowledge the message
            if updates or removed or is_complete:
                revision = tables.revision
                for id in removed:
                    del stream.sent[id]
                for id, _ in updates:
                    # Set before sending, because the node may acknowledge it at once.  Later changes are sent later.
                    stream.sent[id] = revision
                pieces: list[skep.NetworkChange] = []
                for id, sent in updates:
                    if (table := tables.tables.get(id)) is not None:
                        pieces += await self._encoder.pieces(table, sent, revision)
                messages = messages_of(
                    pieces,
                    incarnation=self._store.incarnation,
                    revision=revision,
                    is_complete=is_complete,
                    removed=removed,
                )
                async with self._large if len(pieces) > LARGE_PIECES else nullcontext():
                    await _send_all(stream, send, messages)
                del pieces, messages
                is_complete = False
            del updates, removed, wanted, tables
            await stream.signal.wait()
            stream.require_open()
            await self._clock.sleep(PAUSE_S)
            stream.require_open()
            await self._is_loaded.wait()

    async def _wait_for_session(self, stream: "_Stream") -> None:
        """Wait until the tables include the write with which the node registered.

        They then include everything that earlier managers sent to the node.
        """
        while True:
            stream.require_open()
            await self._is_loaded.wait()
            if self._state.tables.sessions.get(stream.node_id) == stream.session.id:
                return
            await stream.signal.wait()


async def _send_all(stream: "_Stream", send: Send, messages: Iterator[skep.NetworkTables]) -> None:
    """Send the messages in order.  Raises Unavailable if the node does not read them in time."""
    try:
        async with asyncio.timeout(SET_SECONDS_MAX):
            for message in messages:
                stream.require_open()
                await send(message)
                del message
    except TimeoutError as error:
        raise Unavailable("the node does not read its tables") from error


class _Stream(NodeStream):
    """A node's stream."""

    __slots__ = ("sent",)

    def __init__(self, node_id: NodeId, session: NodeSession, signal: StreamWaker) -> None:
        super().__init__(node_id, session, signal)
        self.sent: dict[NetworkId, int] = {}
        """The networks sent to the node, with their revisions."""


CACHED_MAX = 4
"""Cached changes per network: the whole table, and the changes since the last few revisions sent to streams."""


class Encoder:
    """Caches encoded changes until the table changes."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._encoded: WeakKeyDictionary[VersionedTable, _Encoded] = WeakKeyDictionary()

    async def pieces(
        self, table: VersionedTable, sent: int | None, revision: int
    ) -> Sequence[skep.NetworkChange]:
        """Return the change from revision ``sent`` of the table to the current one, perhaps later than ``revision``."""
        kept = self._encoded.get(table)
        if kept is None or kept.changed_at != table.changed_at:
            kept = self._encoded[table] = _Encoded(table.changed_at)
        async with kept.one_at_a_time:
            if sent not in kept.pieces:
                slices = TimeSlices(self._clock)
                pieces = []
                for piece in pieces_of(table.since(sent, revision)):
                    pieces.append(piece)
                    await slices.yield_if_due()
                kept.pieces[sent] = pieces
                if len(kept.pieces) > CACHED_MAX:
                    kept.pieces.popitem(last=False)
            return kept.pieces[sent]


class _Encoded:
    """The encoded changes of one table, as of its last change."""

    def __init__(self, changed_at: int) -> None:
        self.changed_at = changed_at
        self.pieces: OrderedDict[int | None, Sequence[skep.NetworkChange]] = OrderedDict()
        """Encoded changes by the revision sent before."""
        self.one_at_a_time = asyncio.Lock()
        """A thousand streams may need the same change at once.  The first one encodes it."""
