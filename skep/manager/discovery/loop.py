"""Discovery: derives the tables of all networks and streams them to the skep nodes on these networks.

Active on every manager, for the nodes that have a session here.  Tables are derived once for all of them.  A stream
keeps only the last revision sent for each network, and each message is the change from there to the current table.  So
a slow reader gets fewer messages and nothing twice.
"""

import asyncio
from collections import deque
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import nullcontext
from functools import partial
from itertools import islice
from typing import TypeVar

from skep.aio.clock import Clock
from skep.aio.event import Event
from skep.aio.time_slices import TimeSlices
from skep.errors import Unavailable
from skep.manager.discovery.acknowledgements import Acknowledgements
from skep.manager.discovery.derive import overlay_attachments
from skep.manager.discovery.encoding import Encoder
from skep.manager.discovery.network_tables import KINDS, AffectedStreams, NetworkTables
from skep.manager.discovery.versioned_table import names_in
from skep.manager.failures import isolated
from skep.manager.informer import CatchUp, run_exact_informer
from skep.manager.node_session import NodeSession, StreamSignal
from skep.manager.node_streams import NodeStream, NodeStreams, run_stream, session_named
from skep.model.ids import NetworkId, NodeId
from skep.model.paths import NetworkNames
from skep.model.task import Task
from skep.store.interface import Commit, Store, View, WatchLagged
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire.access import Caller
from skep.wire.convert.tables import messages_of
from skep.wire.service import Handler, duplex

PAUSE_S = 0.01
"""Changes within this number of seconds are sent together."""
COMMITS_MAX = 10_000
"""Maximum commits that wait to be handled.  If there are more, everything is loaded again."""

LARGE_PIECES = 2
"""A message with more pieces counts as large."""
LARGE_AT_ONCE = 8
"""Maximum large messages sent at the same time.

A thousand nodes that connect at once would otherwise need a thousand copies of a table."""
SET_SECONDS_MAX = 60.0
"""Seconds within which a node must read a set of messages."""

NAMED_NETWORKS_MAX = 16
"""Maximum networks of a node whose names its diagnostics compare."""

T = TypeVar("T")

Send = Callable[[skep.NetworkTables], Awaitable[None]]


class Discovery:
    """Network tables for this manager's nodes."""

    def __init__(
        self, store: Store, own: NodeId, session: Callable[[NodeId, str], NodeSession], clock: Clock
    ) -> None:
        """Create a service for manager ``own``.

        Args:
            session: Returns a node's session here by its id, or raises SkepError.
        """
        self._store = store
        self._own = own
        self._session = session
        self._clock = clock
        self._tables = NetworkTables()
        self._is_loaded = Event()
        self._loading: Iterator[None] = iter(())
        self._commits: deque[Commit] = deque()
        self._has_commits = Event()
        self._encoder = Encoder(clock)
        self._large = asyncio.Semaphore(LARGE_AT_ONCE)
        self._streams: NodeStreams[_Stream] = NodeStreams("tables")
        self._waiting: dict[Event, None] = {}
        """Events to set whenever the tables may have changed."""
        self.acknowledgements = Acknowledgements()
        self._handled = 0
        """The store revision that the tables and ``acknowledgements`` have reached."""

    def services(self) -> Sequence[Handler]:
        """Return the handlers for ``wire.server.serve``."""
        return (duplex(methods.NETWORKS, self._networks),)

    async def run(self) -> None:
        """Update the tables until cancelled."""
        await run_exact_informer(
            self._store, KINDS, on_snapshot=self._on_snapshot, on_commit=self._on_commit, work=self._work
        )

    # -- for the probes between nodes ----------------------------------------------------------------------------

    def networks_of(self, node_id: NodeId) -> Sequence[NetworkId]:
        """Return the networks that carry tasks of the node, or its published ports."""
        return self._tables.networks_of(node_id)

    def is_encrypted(self, network_id: NetworkId) -> bool:
        """Whether the network is encrypted.  False for a network without a table."""
        table = self._tables.tables.get(network_id)
        return table is not None and table.head is not None and table.head.is_encrypted

    def names_for(self, node_id: NodeId) -> tuple[NetworkNames, ...]:
        """Return the expected addresses of names on some of the node's networks, from the store."""
        tables = (self._tables.tables[id] for id in self._tables.networks_of(node_id))
        return tuple(islice(filter(None, map(names_in, tables)), NAMED_NETWORKS_MAX))

    # -- for the draining of tasks ------------------------------------------------------------------------------

    async def wait_not_serving(self, task: Task, revision: int) -> Mapping[NetworkId, int]:
        """Wait until the tables have reached ``revision`` and the task serves in none of them.

        Returns the revision of that change for each of its networks.
        """

        def revisions() -> Mapping[NetworkId, int] | None:
            tables = [
                self._tables.tables[id] for id in overlay_attachments(task) if id in self._tables.tables
            ]
            found = (table.endpoints.get(task.id) for table in tables)
            is_serving = any(endpoint is not None and endpoint.is_serving for endpoint in found)
            if is_serving or self._tables.revision < revision:
                return None
            # After a restart from a snapshot the change's revision is unknown: it is this one or an earlier one.
            return {table.id: min(table.endpoint_changed_at(task.id), revision) for table in tables}

        return await self._wait_for_result(revisions)

    @property
    def sessions_changed_at(self) -> int:
        """The revision of the last change of the sessions over which nodes receive tables."""
        return self._tables.table_sessions.changed_at

    def managers_on(self, network_id: NetworkId) -> Collection[NodeId]:
        """Return the managers that send the network's table to nodes."""
        return self._tables.managers_on(network_id)

    def managers_of_moved(self, network_id: NetworkId, revision: int) -> frozenset[NodeId]:
        """Return the managers of nodes on the network whose sessions changed after ``revision``."""
        return self._tables.managers_of_moved(network_id, revision)

    async def wait_handled(self) -> None:
        """Wait until the tables and ``acknowledgements`` have reached the store's current revision."""
        revision = self._store.view().revision
        if self._handled >= revision:
            return
        self._has_commits.set()  # this revision may belong to a commit without such objects
        await self._wait_for_result(lambda: self._handled if self._handled >= revision else None)

    async def _wait_for_result(self, find: Callable[[], T | None]) -> T:
        """Wait for a result of ``find``, which is called now and whenever the tables may have changed."""
        changed = Event()
        self._waiting[changed] = None
        try:
            while True:
                await self._is_loaded.wait()
                if (found := find()) is not None:
                    return found
                changed.clear()
                await changed.wait()
        finally:
            del self._waiting[changed]

    # -- keeping up with the store ------------------------------------------------------------------------------

    def _on_snapshot(self, view: View) -> None:
        self._is_loaded.clear()
        self._handled = 0
        self._commits.clear()
        self._tables = NetworkTables()
        self._loading = self._tables.begin(view)
        next(self._loading, None)  # the view is valid until the next pause

    def _on_commit(self, commit: Commit) -> None:
        if len(self._commits) >= COMMITS_MAX:
            raise WatchLagged(f"{COMMITS_MAX} commits wait to be handled by the network tables")
        self._commits.append(commit)
        self._has_commits.set()

    async def _work(self, catch_up: CatchUp) -> None:
        slices = TimeSlices(self._clock)
        for _ in self._loading:
            await slices.yield_if_due()
        await self._count(dict.fromkeys((*self.acknowledgements.nodes(), *self._tables.nodes())), slices)
        self._is_loaded.set()
        for stream in self._streams.values():
            stream.signal.wake()
        while True:
            self._has_commits.clear()
            await catch_up()
            shown = self._store.view().revision
            while self._commits:
                affected = self._tables.note(self._commits.popleft())
                self._wake(affected)
                nodes = sorted(affected.nodes)  # some may have been removed
                await self._count((*nodes, *self._tables.nodes()) if affected.all_nodes else nodes, slices)
                await slices.yield_if_due()
            self._handled = shown
            for changed in self._waiting:
                changed.set()
            await self._has_commits.wait()
            slices = TimeSlices(self._clock)

    async def _count(self, nodes: Iterable[NodeId], slices: TimeSlices) -> None:
        """Update the networks of ``nodes`` in ``acknowledgements`` from the tables."""
        for id in nodes:
            with isolated("acknowledgements", id):
                self._count_node(id)
            await slices.yield_if_due()

    def _count_node(self, id: NodeId) -> None:
        session_id = self._tables.session_with(self._own, id)
        if session_id is None:
            self.acknowledgements.remove_node(id)
        else:
            self.acknowledgements.set_networks(id, session_id, self._tables.networks_of(id))

    def _wake(self, affected: AffectedStreams) -> None:
        """Wake the streams that have something to send."""
        if affected.all_nodes:
            woken = set(self._streams)
        else:
            woken = {id for id in affected.nodes if id in self._streams}
            for network_id in affected.networks:
                nodes = self._tables.nodes_on(network_id)
                woken.update(self._streams if nodes is None else (id for id in nodes if id in self._streams))
        for node_id in sorted(woken):
            self._streams[node_id].signal.wake()

    # -- streams ------------------------------------------------------------------------------------------------

    async def _networks(
        self, requests: AsyncIterator[skep.AppliedTables], send: Send, caller: Caller
    ) -> None:
        session = self._session(caller.node_id, await session_named(requests))
        with (
            session.signal() as signal,
            self._streams.open(_Stream(caller.node_id, session, signal)) as stream,
        ):
            self.acknowledgements.reset_node(caller.node_id)
            await run_stream(
                stream, requests, partial(self._on_applied, stream), self._send_changes(stream, send)
            )

    def _on_applied(self, stream: "_Stream", request: skep.AppliedTables) -> None:
        """Record the tables that the node has applied."""
        for network_id, sent in stream.sent.items() if stream.error is None else ():
            if network_id in request.revisions:
                # A node cannot acknowledge more than it was sent.
                applied = min(request.revisions[network_id], sent)
                self.acknowledgements.applied(stream.node_id, network_id, applied)

    async def _send_changes(self, stream: "_Stream", send: Send) -> None:
        """Send everything, then changes, until the session ends."""
        await self._wait_for_session(stream)
        is_complete = True
        while True:
            tables = self._tables
            wanted = tables.networks_of(stream.node_id)
            removed = sorted(stream.sent.keys() - set(wanted))
            updates = [
                (id, stream.sent.get(id))
                for id in wanted
                if tables.tables[id].has_changed_since(stream.sent.get(id))
            ]
            self._count_node(stream.node_id)  # before it can acknowledge the message
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
            if self._tables.sessions.get(stream.node_id) == stream.session.id:
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

    def __init__(self, node_id: NodeId, session: NodeSession, signal: StreamSignal) -> None:
        super().__init__(node_id, session, signal)
        self.sent: dict[NetworkId, int] = {}
        """The networks sent to the node, with their revisions."""
