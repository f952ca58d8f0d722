"""Discovery: derives the tables of all networks and streams them to the skep nodes on these networks.

Active on every manager, for the nodes that have a session here.  Tables are derived once for all of them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from skep.aio.clock import Clock
from skep.aio.event import Event
from skep.aio.time_slices import TimeSlices
from skep.manager.control_loops.failures import isolated
from skep.manager.control_loops.informer import CatchUp, run_exact_informer
from skep.manager.discovery.network_tables import KINDS
from skep.manager.discovery.state import DiscoveryState
from skep.manager.discovery.table_streams import TableStreams
from skep.manager.nodes.node_session import NodeSession
from skep.model.task import Task
from skep.model.values.ids import NetworkId, NodeId
from skep.store.interface import Commit, Store, View
from skep.wire.service import Handler

T = TypeVar("T")


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
        self._clock = clock
        self._is_loaded = Event()
        self._loading: Iterator[None] = iter(())
        self._has_commits = Event()
        self._waiting: dict[Event, None] = {}
        """Events to set whenever the tables may have changed."""
        self.state = DiscoveryState(own)
        self._streams = TableStreams(store, self.state, session, clock, self._is_loaded)

    def services(self) -> Sequence[Handler]:
        """Return the handlers for ``wire.server.serve``."""
        return self._streams.services()

    async def run(self) -> None:
        """Update the tables until cancelled."""
        await run_exact_informer(
            self._store, KINDS, on_snapshot=self._on_snapshot, on_commit=self._on_commit, work=self._work
        )

    async def wait_not_serving(self, task: Task, revision: int) -> Mapping[NetworkId, int]:
        """Wait until the tables have reached ``revision`` and the task serves in none of them.

        Returns the revision of that change for each of its networks.
        """
        return await self._wait_for_result(lambda: self.state.not_serving(task, revision))

    async def wait_handled(self) -> None:
        """Wait until the tables and ``acknowledgements`` have reached the store's current revision."""
        revision = self._store.view().revision
        if self.state.handled >= revision:
            return
        self._has_commits.set()  # this revision may belong to a commit without such objects
        await self._wait_for_result(lambda: self.state.handled if self.state.handled >= revision else None)

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
        self._loading = self.state.start(view)
        next(self._loading, None)

    def _on_commit(self, commit: Commit) -> None:
        self.state.on_commit(commit)
        self._has_commits.set()

    async def _work(self, catch_up: CatchUp) -> None:
        state, slices = self.state, TimeSlices(self._clock)
        for _ in self._loading:
            await slices.yield_if_due()
        await self._count(dict.fromkeys((*state.acknowledgements.nodes(), *state.tables.nodes())), slices)
        self._is_loaded.set()
        self._streams.wake_all()
        while True:
            self._has_commits.clear()
            await catch_up()
            shown = self._store.view().revision
            for affected in state.changes():
                self._streams.wake(affected)
                nodes = sorted(affected.nodes)  # some may have been removed
                await self._count((*nodes, *state.tables.nodes()) if affected.all_nodes else nodes, slices)
                await slices.yield_if_due()
            state.handled = shown
            for changed in self._waiting:
                changed.set()
            await self._has_commits.wait()
            slices = TimeSlices(self._clock)

    async def _count(self, nodes: Iterable[NodeId], slices: TimeSlices) -> None:
        """Update the networks of ``nodes`` in ``acknowledgements`` from the tables."""
        for id in nodes:
            with isolated("acknowledgements", id):
                self.state.count(id)
            await slices.yield_if_due()
