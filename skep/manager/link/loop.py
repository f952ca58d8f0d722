"""Links to all other managers: pings in both directions, calls, and further connections for relayed logs.

Each manager connects to each other one, so two managers have a connection in either direction.
"""

import asyncio
from collections.abc import Mapping, Sequence, Set
from contextlib import AbstractAsyncContextManager
from random import Random

import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.errors import SkepError
from skep.manager.cluster import node_name
from skep.manager.control_loops.informer import run_informer
from skep.manager.link.channels import Connect, LinkChannels
from skep.manager.link.pings import Pings
from skep.manager.manager_list import affects_managers
from skep.manager.peer_reports import PeerReports
from skep.manager.storage.incarnation import Incarnation
from skep.model.node import Node
from skep.model.values.ids import NodeId
from skep.store.interface import Commit, Store, View
from skep.wire import methods
from skep.wire.client import ManagerChannel
from skep.wire.service import Handler, both_stream

log = structlog.get_logger(__name__)

FIRST_RETRY_S = 0.1
"""Seconds before the first new attempt to connect to a manager."""
LONGEST_RETRY_S = 1.0
"""Longest retry delay in seconds.  Short, because a manager that returns must be seen before it counts as silent."""


class ManagerLink:
    """This manager's connections to the others."""

    def __init__(
        self,
        store: Store,
        own: NodeId,
        connect: Connect,
        clock: Clock,
        random: Random,
        *,
        incarnation: Incarnation | None = None,
        reports: PeerReports | None = None,
    ) -> None:
        """Create the links.

        Args:
            incarnation: Incarnation served here.  Managers of other incarnations are ignored.
            reports: Reports that are sent and received with the pings.
        """
        self._store = store
        self._own = own
        self._clock = clock
        self._random = random
        self._channels = LinkChannels(connect, lambda node_id: node_name(store.view(), node_id))
        self._pings = Pings(
            store, own, self._channels, clock, incarnation or Incarnation(1), reports or PeerReports()
        )
        self._peers: dict[NodeId, str] = {}
        self._changed = asyncio.Event()

    def services(self) -> Sequence[Handler]:
        """Return the handlers for ``wire.server.serve``."""
        return (both_stream(methods.PINGS, self._pings.answer),)

    def silent(self, now: float) -> Mapping[NodeId, float]:
        """Return the managers that are silent at ``now`` (monotonic seconds), with the seconds since their
        last ping.
        """
        return self._pings.silent(now)

    def reachable(self, now: float) -> Set[NodeId]:
        """Return the managers that answered a ping shortly before ``now`` and have contact with a quorum."""
        return self._pings.reachable(now)

    async def ask(self) -> Set[NodeId]:
        """Ping all managers.  Return the managers that answer soon and have contact with a quorum."""
        return await self._pings.ask()

    def channel(self, manager: NodeId) -> ManagerChannel:
        """Return the open connection to a manager.  Raises: Unavailable."""
        return self._channels.channel(manager)

    def channel_beside(self, manager: NodeId) -> AbstractAsyncContextManager[ManagerChannel]:
        """Open a separate connection for one more reader.  It ends with the link.  Raises: Unavailable."""
        return self._channels.channel_beside(manager)

    async def run(self) -> None:
        """Keep a connection to every other manager until cancelled."""
        await run_informer(
            self._store, (Node,), on_snapshot=self._on_snapshot, on_commit=self._on_commit, work=self._work
        )

    def _on_snapshot(self, view: View) -> None:
        self._peers = {
            node.id: node.manager_status.addr
            for node in view.find(Node)
            if node.id != self._own and node.manager_status is not None and node.manager_status.addr
        }
        self._pings.expect(self._peers)
        self._changed.set()

    def _on_commit(self, commit: Commit) -> None:
        if affects_managers(commit):
            self._on_snapshot(self._store.view())

    async def _work(self) -> None:
        async with asyncio.TaskGroup() as group:
            self._channels.share_in(group)
            group.create_task(self._pings.measure_time(), name="own time")
            await self._connect_all(group)

    async def _connect_all(self, group: asyncio.TaskGroup) -> None:
        """Run one task per manager, which is cancelled if the manager is removed or changes its address."""
        kept: dict[tuple[NodeId, str], asyncio.Task[None]] = {}
        while True:
            self._changed.clear()
            wanted = sorted(self._peers.items())
            for peer in [peer for peer in kept if peer not in wanted]:
                kept.pop(peer).cancel()
            for peer in wanted:
                if peer not in kept:
                    kept[peer] = group.create_task(self._connect_peer(*peer), name=f"link to {peer[0]}")
            await self._changed.wait()

    async def _connect_peer(self, manager: NodeId, addr: str) -> None:
        backoff = Backoff(FIRST_RETRY_S, LONGEST_RETRY_S, rng=self._random.random)
        while True:
            # A separate task, because a broken connection cancels the task that uses it, which must not be this loop.
            async with asyncio.TaskGroup() as group:
                attempt = group.create_task(self._attempt(manager, addr), name="link attempt")
            if attempt.result():
                backoff.reset()
            await backoff.sleep(self._clock)

    async def _attempt(self, manager: NodeId, addr: str) -> bool:
        """Hold one connection until it breaks.  Returns whether the manager is reachable."""
        try:
            async with self._channels.connect(addr) as channel:
                await self._pings.exchange(channel, manager, addr)
        except (SkepError, TimeoutError) as error:
            log.debug("link not established, will retry", manager=manager, address=addr, reason=str(error))
        return manager not in self.silent(self._clock.monotonic())
