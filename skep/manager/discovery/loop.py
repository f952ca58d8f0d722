"""Discovery: keeps the tables of all networks and streams them to the skep nodes that take part.

Active on every manager, for the nodes that have a session here.  Tables are worked out once for all of them; a stream
knows of each network only the revision that it told last, and what it tells is always the way from there to now, so a
node that reads slowly is told less often and nothing twice.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice

import structlog

from skep.aio.clock import Clock
from skep.aio.event import Event
from skep.aio.slices import Slices
from skep.errors import Unavailable
from skep.manager.discovery.acknowledgements import Acknowledgements
from skep.manager.discovery.derive import places_of
from skep.manager.discovery.encoding import Encoder
from skep.manager.discovery.ledger import KINDS, Ledger, Stirred
from skep.manager.discovery.names import names_in
from skep.manager.informer import run_informer
from skep.manager.node_session import Line, NodeSession
from skep.manager.node_streams import NodeStream, NodeStreams, converse, session_named
from skep.model.ids import NetworkId, NodeId
from skep.model.paths import NetworkNames
from skep.model.task import Task
from skep.store.interface import Commit, Store, View, WatchLagged
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire.access import Caller
from skep.wire.convert.tables import messages_of
from skep.wire.service import Handler, duplex

log = structlog.get_logger(__name__)

PAUSE_S = 0.01
"""After news: what comes within it is told at once."""
COMMITS_MAX = 10_000
"""That wait to be taken in; more, and everything is read anew."""

LARGE_PIECES = 2
LARGE_AT_ONCE = 8
"""Sets of more pieces that are under way: a thousand nodes that come at once would be a thousand copies of a table."""
SET_SECONDS_MAX = 60.0

NAMED_NETWORKS_MAX = 16
"""Networks of a node whose names are told when they are looked through."""

Send = Callable[[skep.NetworkTables], Awaitable[None]]


class Discovery:
    """What the nodes here know of their networks."""

    def __init__(self, store: Store, session: Callable[[NodeId, str], NodeSession], clock: Clock) -> None:
        """``session``: a node's session here, by its id; raises SkepError if there is no such one."""
        self._store = store
        self._session = session
        self._clock = clock
        self._ledger = Ledger()
        self._is_loaded = Event()
        self._loading: Iterator[None] = iter(())
        self._commits: deque[Commit] = deque()
        self._has_commits = Event()
        self._encoder = Encoder(clock)
        self._large = asyncio.Semaphore(LARGE_AT_ONCE)
        self._streams: NodeStreams[_Stream] = NodeStreams("tables")
        self._waiting: dict[Event, None] = {}
        """Set whenever the tables may have changed."""
        self.acknowledgements = Acknowledgements()

    def services(self) -> Sequence[Handler]:
        """What to hand to ``wire.server.serve``."""
        return (duplex(methods.NETWORKS, self._networks),)

    async def run(self) -> None:
        """Keep the tables until cancelled."""
        await run_informer(
            self._store, KINDS, on_snapshot=self._on_snapshot, on_commit=self._on_commit, work=self._work
        )

    # -- for the paths between nodes -----------------------------------------------------------------------------

    def networks_of(self, node_id: NodeId) -> Sequence[NetworkId]:
        """The networks that carry tasks of the node, or its published ports."""
        return self._ledger.networks_of(node_id)

    def is_encrypted(self, network_id: NetworkId) -> bool:
        book = self._ledger.books.get(network_id)
        return book is not None and book.head is not None and book.head.is_encrypted

    def names_for(self, node_id: NodeId) -> tuple[NetworkNames, ...]:
        """What names stand for on some of the node's networks, as the store says."""
        books = (self._ledger.books[id] for id in self._ledger.networks_of(node_id))
        return tuple(islice(filter(None, map(names_in, books)), NAMED_NETWORKS_MAX))

    # -- for the draining of tasks ------------------------------------------------------------------------------

    def nodes_on(self, network_id: NetworkId) -> Iterable[NodeId] | None:
        """The nodes that are told of a network; None: all there are."""
        return self._ledger.nodes_on(network_id)

    async def wait_not_serving(self, task: Task, revision: int) -> Mapping[NetworkId, int]:
        """Return when the tables show ``revision``, and the task serves in none of them any more.

        Gives since which revision, for each of its networks.
        """
        moved = Event()
        self._waiting[moved] = None
        try:
            while True:
                await self._is_loaded.wait()
                books = [self._ledger.books[id] for id in places_of(task) if id in self._ledger.books]
                found = (book.endpoints.get(task.id) for book in books)
                is_serving = any(endpoint is not None and endpoint.is_serving for endpoint in found)
                if self._ledger.revision >= revision and not is_serving:
                    return {book.id: book.endpoint_changed_at(task.id) for book in books}
                moved.clear()
                await moved.wait()
        finally:
            del self._waiting[moved]

    # -- keeping up with the store ------------------------------------------------------------------------------

    def _on_snapshot(self, view: View) -> None:
        self._is_loaded.clear()
        self._commits.clear()
        self._ledger = Ledger()
        self._loading = self._ledger.begin(view)
        next(self._loading, None)  # the view is good until the next pause

    def _on_commit(self, commit: Commit) -> None:
        if len(self._commits) >= COMMITS_MAX:
            raise WatchLagged(f"{COMMITS_MAX} commits wait to become tables")
        self._commits.append(commit)
        self._has_commits.set()

    async def _work(self) -> None:
        slices = Slices(self._clock)
        for _ in self._loading:
            await slices.give_way()
        self._is_loaded.set()
        for stream in self._streams.values():
            stream.line.wake()
        while True:
            while self._commits:
                self._wake(self._ledger.note(self._commits.popleft()))
                await slices.give_way()
            for moved in self._waiting:
                moved.set()
            self._has_commits.clear()
            await self._has_commits.wait()
            slices = Slices(self._clock)

    def _wake(self, stirred: Stirred) -> None:
        """Have the streams look that may have news."""
        if stirred.is_everybody:
            woken = set(self._streams)
        else:
            woken = {id for id in stirred.nodes if id in self._streams}
            for network_id in stirred.networks:
                nodes = self._ledger.nodes_on(network_id)
                woken.update(self._streams if nodes is None else (id for id in nodes if id in self._streams))
        for node_id in sorted(woken):
            self._streams[node_id].line.wake()

    # -- streams ------------------------------------------------------------------------------------------------

    async def _networks(
        self, requests: AsyncIterator[skep.AppliedTables], send: Send, caller: Caller
    ) -> None:
        session = self._session(caller.node_id, await session_named(requests))
        with (
            session.aside() as line,
            self._streams.open(_Stream(caller.node_id, session, line)) as stream,
            self._taking_part(stream),
        ):
            await converse(stream, requests, partial(self._hear, stream), self._tell(stream, send))

    @contextmanager
    def _taking_part(self, stream: "_Stream") -> Iterator[None]:
        """What a node has applied is waited for while it has a stream; nothing of an earlier stream counts."""
        self.acknowledgements.gone(stream.node_id)
        # It may have tables of an earlier session in force.
        self.acknowledgements.take_part(stream.node_id, self._ledger.networks_of(stream.node_id))
        try:
            yield
        finally:
            if self._streams.get(stream.node_id) is stream:
                self.acknowledgements.gone(stream.node_id)

    def _hear(self, stream: "_Stream", request: skep.AppliedTables) -> None:
        """What the node has applied."""
        for network_id, told in stream.told.items() if stream.error is None else ():
            if network_id in request.revisions:
                # More than it was told it cannot know.
                applied = min(request.revisions[network_id], told)
                self.acknowledgements.applied(stream.node_id, network_id, applied)

    async def _tell(self, stream: "_Stream", send: Send) -> None:
        """Everything, then what changes, for as long as the session lasts."""
        await self._wait_for_session(stream)
        is_complete = True
        while True:
            ledger = self._ledger
            wanted = ledger.networks_of(stream.node_id)
            gone = sorted(stream.told.keys() - set(wanted))
            news = [
                (id, stream.told.get(id))
                for id in wanted
                if ledger.books[id].is_news_for(stream.told.get(id))
            ]
            self.acknowledgements.take_part(stream.node_id, wanted)
            if news or gone or is_complete:
                revision = ledger.revision
                for id in gone:
                    del stream.told[id]
                for id, _ in news:
                    # From now on the node may say that it has it; and what comes later is told later.
                    stream.told[id] = revision
                pieces: list[skep.NetworkChange] = []
                for id, told in news:
                    if (book := ledger.books.get(id)) is not None:
                        pieces += await self._encoder.pieces(book, told, revision)
                messages = messages_of(
                    pieces,
                    incarnation=self._store.incarnation,
                    revision=revision,
                    is_complete=is_complete,
                    removed=gone,
                )
                async with self._large if len(pieces) > LARGE_PIECES else nullcontext():
                    await _send_all(stream, send, messages)
                del pieces, messages
                is_complete = False
            del news, gone, wanted, ledger
            await stream.line.wait()
            stream.require_open()
            await self._clock.sleep(PAUSE_S)
            stream.require_open()
            await self._is_loaded.wait()

    async def _wait_for_session(self, stream: "_Stream") -> None:
        """Return when the tables show the write with which the node registered, and so all that others told it."""
        while True:
            stream.require_open()
            await self._is_loaded.wait()
            if self._ledger.sessions.get(stream.node_id) == stream.session.id:
                return
            await stream.line.wait()


async def _send_all(stream: "_Stream", send: Send, messages: Iterator[skep.NetworkTables]) -> None:
    """Raises: Unavailable: the node does not read."""
    try:
        async with asyncio.timeout(SET_SECONDS_MAX):
            for message in messages:
                stream.require_open()
                await send(message)
                del message
    except TimeoutError as error:
        raise Unavailable("the node does not read its tables") from error


class _Stream(NodeStream):
    """One node's."""

    __slots__ = ("told",)

    def __init__(self, node_id: NodeId, session: NodeSession, line: Line) -> None:
        super().__init__(node_id, session, line)
        self.told: dict[NetworkId, int] = {}
        """The networks it was told of, and up to which revision."""
