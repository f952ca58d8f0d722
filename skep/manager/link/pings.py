"""Pings between managers: sent on each link, answered, and recorded with the reports that they carry.

A ping in either direction counts, since it was sent and received.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Set
from contextlib import suppress

from skep.aio.clock import Clock
from skep.aio.event_loop.hang_detection import RunningTime
from skep.aio.race import is_set_within
from skep.errors import PermissionDenied, Unavailable
from skep.manager.ca.caller_check import check_caller
from skep.manager.link.channels import LinkChannels
from skep.manager.peer_reports import REGISTERING_MAX, PeerReport, PeerReports
from skep.manager.storage.incarnation import Incarnation
from skep.model.values.ids import NodeId
from skep.store.interface import Store
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire.access import Caller
from skep.wire.client import ManagerChannel
from skep.wire.methods import MethodAccess

TICK_S = 0.2
"""Seconds between two ticks that measure this loop's running time."""
PING_S = 0.5
"""Seconds between two pings: several fit into ``SILENT_S``."""
RESPONSE_SECONDS_MAX = 1.5
"""Seconds to wait for the answer to a ping.  Shorter than ``SILENT_S``."""

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


class Pings:
    """Sends pings to the other managers, answers theirs, and knows which managers they have reached."""

    def __init__(
        self,
        store: Store,
        own: NodeId,
        channels: LinkChannels,
        clock: Clock,
        incarnation: Incarnation,
        reports: PeerReports,
    ) -> None:
        self._store = store
        self._own = own
        self._channels = channels
        self._clock = clock
        self._incarnation = incarnation
        self._reports = reports
        self._last_seen = ManagersLastSeen()
        self._time = RunningTime(seen_at=clock.monotonic())
        self._has_peers = asyncio.Event()
        self._wanted_now = asyncio.Event()
        """Set to ping every other manager at once, and then replaced."""
        self._answered = asyncio.Event()

    def expect(self, managers: Iterable[NodeId]) -> None:
        """Set the other managers."""
        expected = tuple(managers)
        self._last_seen.expect(expected, self._time.seconds)
        if expected:
            self._has_peers.set()
        else:
            self._has_peers.clear()

    async def measure_time(self) -> None:
        """Advance the own time, which only the silence of others is measured in."""
        while True:
            await self._has_peers.wait()
            await self._clock.sleep(TICK_S)
            self._time = self._time.after(self._clock.monotonic(), TICK_S)

    def silent(self, now: float) -> Mapping[NodeId, float]:
        """Return the managers that are silent at ``now`` (monotonic seconds), with the seconds since their
        last ping.
        """
        return self._last_seen.silent(self._running_s(now))

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
                while not self._channels.linked() <= self._last_seen.answered(began):
                    self._answered.clear()
                    await self._answered.wait()
        return self._last_seen.answered(began) - self._reports.without_quorum()

    # -- messages ---------------------------------------------------------------------------------------------------

    async def exchange(self, channel: ManagerChannel, manager: NodeId, addr: str) -> None:
        """Ping ``manager``, and offer the connection for calls, until the connection breaks.

        Raises: SkepError, TimeoutError: the manager does not answer, or another one does.
        """
        try:
            async with channel.stream(methods.PINGS) as call:
                while True:
                    wanted_now, asked_at = self._wanted_now, self._clock.monotonic()
                    async with asyncio.timeout(RESPONSE_SECONDS_MAX):
                        await call.send(self._own_ping())
                        reply = self._checked(await call.receive(), channel.address, manager)
                    now = self._clock.monotonic()
                    self._channels.add(manager, channel)
                    self._last_seen.note_answer(manager, self._running_s(now), asked_at)
                    self._reports.record(manager, report_in(reply), now)
                    self._answered.set()
                    await is_set_within(wanted_now, PING_S)
        finally:
            if self._channels.remove(manager, addr):
                self._answered.set()

    def _checked(self, reply: skep.Ping | None, address: str, manager: NodeId) -> skep.Ping:
        """Return the reply if it is one of ``manager``.  Raises: Unavailable."""
        if reply is None:
            raise Unavailable(f"{address} ended the link")
        if reply.node_id != manager:
            raise Unavailable(f"{address} is manager {reply.node_id}, not {manager}")
        if not self._incarnation.observe(manager, reply.incarnation):
            raise Unavailable(f"{address} serves incarnation {reply.incarnation}")
        return reply

    async def answer(self, pings: AsyncIterator[skep.Ping], caller: Caller) -> AsyncIterator[skep.Ping]:
        """Answer each ping of another manager."""
        async for ping in pings:
            if self._is_manager(caller) and self._incarnation.observe(caller.node_id, ping.incarnation):
                now = self._clock.monotonic()
                self._last_seen.note(caller.node_id, self._running_s(now))
                self._reports.record(caller.node_id, report_in(ping), now)
            yield self._own_ping()

    def _running_s(self, now: float) -> float:
        """Return this loop's running time at ``now``, also between two ticks.

        With the time of the last tick instead, a manager would count as silent a tick too early, while it still counts
        as reachable.
        """
        return self._time.after(now, TICK_S).seconds

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


def report_in(ping: skep.Ping) -> PeerReport:
    """Return the report that a ping carries, bounded."""
    return PeerReport(
        is_overloaded=ping.crowded,
        missed=ping.missed,
        registering=tuple(map(NodeId, ping.registering[:REGISTERING_MAX])),
        is_without_quorum=ping.without_quorum,
    )
