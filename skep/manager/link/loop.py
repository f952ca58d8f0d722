"""Links to all other managers: pings in both directions, calls, and further connections for relayed logs.

Each manager connects to each other one, so two managers have a connection in either direction.  A ping in either
direction counts, since it was sent and received.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence, Set
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from random import Random
from typing import Protocol

import structlog

from skep.aio.backoff import Backoff
from skep.aio.clock import Clock
from skep.aio.event_loop.hang_detection import RunningTime
from skep.aio.race import wait_first
from skep.errors import PermissionDenied, SkepError, Unavailable
from skep.manager.ca.caller_check import check_caller
from skep.manager.control_loops.informer import run_informer
from skep.manager.manager_list import affects_managers
from skep.manager.peer_reports import REGISTERING_MAX, PeerReport, PeerReports
from skep.manager.storage.incarnation import Incarnation
from skep.model.logs import LogQuery
from skep.model.node import Node
from skep.model.values.ids import NodeId
from skep.rpc.client import Bounds
from skep.store.interface import Commit, Store, View
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire.access import Caller
from skep.wire.client import BOUNDS, ManagerChannel
from skep.wire.convert.logs import query_to_pb
from skep.wire.methods import MethodAccess
from skep.wire.service import Handler, both_stream
from skep.wire.shared import SharedConnections

log = structlog.get_logger(__name__)

TICK_S = 0.2
"""Seconds between two ticks that measure this loop's running time."""
PING_S = 0.5
"""Seconds between two pings: several fit into ``SILENT_S``."""
RESPONSE_SECONDS_MAX = 1.5
"""Seconds to wait for the answer to a ping.  Shorter than ``SILENT_S``."""
FIRST_RETRY_S = 0.1
"""Seconds before the first new attempt to connect to a manager."""
LONGEST_RETRY_S = 1.0
"""Longest retry delay in seconds.  Short, because a manager that returns must be seen before it counts as silent."""
RELAYS_MAX = 80
"""Relayed logs on one connection."""
RELAY_BOUNDS = Bounds(stream_window=256 * 1024, connection_window=24 * 1024 * 1024, message=BOUNDS.message)
"""Limits of connections for relayed logs.

All streams' windows together are smaller than the connection's, so readers that do not read block no others.
"""


class Connect(Protocol):
    """Connects to another manager with this manager's certificate."""

    def __call__(self, addr: str, *, bounds: Bounds = BOUNDS) -> AbstractAsyncContextManager[ManagerChannel]:
        """Connect to the manager at ``addr``, as a manager.  Raises: Unavailable."""


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
        self._connect = connect
        self._clock = clock
        self._random = random
        self._incarnation = incarnation or Incarnation(1)
        self._reports = reports or PeerReports()
        self._last_seen = ManagersLastSeen()
        self._time = RunningTime(seen_at=clock.monotonic())
        self._peers: dict[NodeId, str] = {}
        self._channels: dict[NodeId, ManagerChannel] = {}
        self._beside: SharedConnections | None = None
        self._changed = asyncio.Event()
        self._has_peers = asyncio.Event()
        self._wanted_now = asyncio.Event()
        """Set to ping every other manager at once, and then replaced."""
        self._answered = asyncio.Event()

    def services(self) -> Sequence[Handler]:
        """Return the handlers for ``wire.server.serve``."""
        return (both_stream(methods.PINGS, self._pings),)

    def silent(self, now: float) -> Mapping[NodeId, float]:
        """Return the managers that are silent at ``now`` (monotonic seconds), with the seconds since their
        last ping.
        """
        return self._last_seen.silent(self._time.after(now, TICK_S).seconds)

    def reachable(self, now: float) -> Set[NodeId]:
        """Return the managers that answered a ping shortly before ``now`` and have contact with a quorum."""
        return self._last_seen.reachable(now) - self._reports.without_quorum()

    async def ask(self) -> Set[NodeId]:
        """Ping all managers.  Return the managers that answer within ``RESPONSE_SECONDS_MAX`` and have contact
        with a quorum.
        """
        began = self._clock.monotonic()
        self._wanted_now.set()
        self._wanted_now = asyncio.Event()
        with suppress(TimeoutError):
            async with asyncio.timeout(RESPONSE_SECONDS_MAX):
                while not self._channels.keys() <= self._last_seen.answered(began):
                    self._answered.clear()
                    await self._answered.wait()
        return self._last_seen.answered(began) - self._reports.without_quorum()

    def channel(self, manager: NodeId) -> ManagerChannel:
        """Return the open connection to a manager.  Raises: Unavailable."""
        channel = self._channels.get(manager)
        if channel is None:
            raise Unavailable(f"manager {manager} cannot be reached now: try again")
        return channel

    @asynccontextmanager
    async def channel_beside(self, manager: NodeId) -> AsyncIterator[ManagerChannel]:
        """Open a separate connection for one more reader.  It ends with the link.  Raises: Unavailable."""
        address = self.channel(manager).address
        assert self._beside is not None, "channel raises without a link"
        async with self._beside.channel(address) as channel:
            yield channel

    async def run(self) -> None:
        """Keep a connection to every other manager until cancelled."""
        await run_informer(
            self._store, (Node,), on_snapshot=self._on_snapshot, on_commit=self._on_commit, work=self._work
        )

    # -- the other managers ---------------------------------------------------------------------------------------

    def _on_snapshot(self, view: View) -> None:
        self._peers = {
            node.id: node.manager_status.addr
            for node in view.find(Node)
            if node.id != self._own and node.manager_status is not None and node.manager_status.addr
        }
        self._last_seen.expect(self._peers, self._time.seconds)
        if self._peers:
            self._has_peers.set()
        else:
            self._has_peers.clear()
        self._changed.set()

    def _on_commit(self, commit: Commit) -> None:
        if affects_managers(commit):
            self._on_snapshot(self._store.view())

    async def _work(self) -> None:
        async with asyncio.TaskGroup() as group:
            self._beside = SharedConnections(
                partial(self._connect, bounds=RELAY_BOUNDS), group, streams_max=RELAYS_MAX
            )
            group.create_task(self._live(), name="own time")
            await self._connect_all(group)

    async def _live(self) -> None:
        """Advance the own time, which only the silence of others is measured in."""
        while True:
            await self._has_peers.wait()
            await self._clock.sleep(TICK_S)
            self._time = self._time.after(self._clock.monotonic(), TICK_S)

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

    # -- one manager ------------------------------------------------------------------------------------------------

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
            async with self._connect(addr) as channel:
                try:
                    await self._ping(channel, manager)
                finally:
                    if self._channels.pop(manager, None) is not None:
                        self._answered.set()
                        log.info("link lost", manager=manager)
                        if self._beside is not None:
                            self._beside.drop(addr)
        except (SkepError, TimeoutError) as error:
            log.debug("link not established, will retry", manager=manager, address=addr, reason=str(error))
        return self._is_reachable(manager)

    def _is_reachable(self, manager: NodeId) -> bool:
        return manager not in self.silent(self._clock.monotonic())

    async def _ping(self, channel: ManagerChannel, manager: NodeId) -> None:
        async with channel.stream(methods.PINGS) as call:
            while True:
                wanted_now, asked_at = self._wanted_now, self._clock.monotonic()
                async with asyncio.timeout(RESPONSE_SECONDS_MAX):
                    await call.send(self._own_ping())
                    reply = await call.receive()
                if reply is None:
                    raise Unavailable(f"{channel.address} ended the link")
                if reply.node_id != manager:
                    raise Unavailable(f"{channel.address} is manager {reply.node_id}, not {manager}")
                if not self._incarnation.observe(manager, reply.incarnation):
                    raise Unavailable(f"{channel.address} serves incarnation {reply.incarnation}")
                if self._channels.get(manager) is not channel:
                    self._channels[manager] = channel
                    log.info("link established", manager=manager, address=channel.address)
                self._last_seen.note_answer(manager, self._time.seconds, asked_at)
                self._reports.record(manager, _report_in(reply), self._clock.monotonic())
                self._answered.set()
                await wait_first(wanted_now.wait(), self._clock.sleep(PING_S))

    async def _pings(self, pings: AsyncIterator[skep.Ping], caller: Caller) -> AsyncIterator[skep.Ping]:
        async for ping in pings:
            if self._is_manager(caller) and self._incarnation.observe(caller.node_id, ping.incarnation):
                self._last_seen.note(caller.node_id, self._time.seconds)
                self._reports.record(caller.node_id, _report_in(ping), self._clock.monotonic())
            yield self._own_ping()

    def _own_ping(self) -> skep.Ping:
        report = self._reports.own
        return skep.Ping(
            incarnation=self._incarnation.served,
            node_id=self._own,
            crowded=report.is_overloaded,
            missed=report.missed,
            without_quorum=report.is_without_quorum,
            registering=report.registering,
        )

    def _is_manager(self, caller: Caller) -> bool:
        """Return whether the caller is one of the managers.  Unknown callers only get a ping with the incarnation in
        return.

        A later incarnation in their pings would stop this manager permanently.
        """
        if caller.identity is None:
            return False
        try:
            return check_caller(self._store.view(), caller.identity, MethodAccess.MANAGER)
        except PermissionDenied:
            return False


def _report_in(ping: skep.Ping) -> PeerReport:
    return PeerReport(
        is_overloaded=ping.crowded,
        missed=ping.missed,
        registering=tuple(map(NodeId, ping.registering[:REGISTERING_MAX])),
        is_without_quorum=ping.without_quorum,
    )


class LinkRelays:
    """Implements ``logbroker.broker.Relays``."""

    def __init__(self, link: ManagerLink) -> None:
        self._link = link

    async def relay_logs(
        self, manager: NodeId, query: LogQuery, nodes: Sequence[NodeId]
    ) -> AsyncGenerator[skep.RelayedLogs, None]:
        """Yield the logs of ``nodes`` as relayed by ``manager``.  Ends when all of them have ended.

        A manager that falls silent loses the link, which ends this stream.  Raises: Unavailable.
        """
        selector, options = query_to_pb(query)
        async with self._link.channel_beside(manager) as channel, channel.stream(methods.RELAY_LOGS) as call:
            await call.send(skep.LogRelay(selector=selector, options=options, node_ids=nodes), end=True)
            async for message in call:
                yield message


SILENT_S = 2.0
"""Seconds without a ping after which a manager counts as lost, and the leader adopts its sessions."""


class ManagersLastSeen:
    """Times at which each other manager was last seen: which are silent, and which are certainly reachable.

    Silence is measured in this loop's running time (``aio.event_loop.hang_detection``), which excludes time in which
    the loop did not run.  A received ping ends the silence, although it may have been in transit during a whole
    partition.  Only a manager that has responded to a ping is certainly reachable, because it received that ping after
    this manager had sent it.
    """

    def __init__(self) -> None:
        self._last_seen: dict[NodeId, float] = {}
        self._asked_at: dict[NodeId, float] = {}
        """When the last answered ping to each manager was sent, on the monotonic clock."""

    def expect(self, managers: Iterable[NodeId], now: float) -> None:
        """Set the other managers.  A new manager counts as seen ``now``, in running time."""
        self._last_seen = {id: self._last_seen.get(id, now) for id in managers}
        self._asked_at = {id: at for id, at in self._asked_at.items() if id in self._last_seen}

    def note(self, manager: NodeId, now: float) -> None:
        """Record a ping of ``manager``.  Unknown managers are ignored."""
        if manager in self._last_seen:
            self._last_seen[manager] = now

    def note_answer(self, manager: NodeId, now: float, asked_at: float) -> None:
        """Record an answer of ``manager`` at ``now`` (running time) to a ping sent at ``asked_at`` (monotonic)."""
        self.note(manager, now)
        if manager in self._last_seen:
            self._asked_at[manager] = asked_at

    def silent(self, now: float) -> Mapping[NodeId, float]:
        """Return the managers without a ping for ``SILENT_S``, with the seconds since the last one."""
        ages = {id: now - reachable for id, reachable in sorted(self._last_seen.items())}
        return {id: age for id, age in ages.items() if age >= SILENT_S}

    def reachable(self, now: float) -> Set[NodeId]:
        """Return the managers that answered a ping sent less than ``SILENT_S`` before ``now`` (monotonic seconds).

        A manager that is neither silent nor reachable is new, or slow.
        """
        return {id for id, asked_at in self._asked_at.items() if now - asked_at < SILENT_S}

    def answered(self, since: float) -> Set[NodeId]:
        """Return the managers that have answered a ping sent at or after ``since`` (monotonic seconds)."""
        return {id for id, asked_at in self._asked_at.items() if asked_at >= since}
