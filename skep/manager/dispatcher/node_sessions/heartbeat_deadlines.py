"""When the heartbeat of each node expires, in this manager's own time, and the suspension during overload.

``Heartbeats`` receives them.  Nothing else waits: ``down_nodes.py`` advances the time and marks the nodes down whose
deadlines have passed.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager
from random import Random

import structlog

from skep.aio.clock import until_tick
from skep.aio.event_loop.hang_detection import RunningTime
from skep.errors import SkepError, Unavailable
from skep.manager.dispatcher.loads import load_from_heartbeat
from skep.manager.dispatcher.node_sessions.registration import SilentNode
from skep.manager.dispatcher.node_sessions.sessions import LiveSession, Sessions
from skep.manager.nodes.heartbeats import (
    DEFAULT_PERIOD_S,
    RECOVERY_GRACE_S,
    SUSPENDED_S_MAX,
    configured_heartbeats,
    grace_after_absence,
    grace_after_adoption,
    grace_period,
    grace_when_away,
    heartbeat_period,
    suspension_left,
)
from skep.model.values.ids import NodeId, SessionId
from skep.model.values.times import SECOND_NS
from skep.store.interface import View
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire import swarm_pb2 as pb
from skep.wire.access import Caller
from skep.wire.convert.usages import (
    idle_from_pb,
    reported_requests_from_pb,
    requests_from_pb,
    routes_from_pb,
    usages_from_pb,
)
from skep.wire.convert.values import duration_to_pb
from skep.wire.service import Handler, both_stream, unary

log = structlog.get_logger(__name__)

REQUESTS_MAX = 1000
"""Most reports of requests in a heartbeat.  Nodes send fewer."""
IDLE_MAX = 1000
"""Most idle times in a heartbeat.  Nodes send fewer."""
TICK_S, TICK_S_MAX = 0.2, 0.5
"""Minimum and maximum seconds between checks for silent nodes, unless a deadline passes earlier."""
OWN_PERIOD_S = 2.0
"""Minimum seconds between heartbeats of a single manager's own node, which the manager's machine cannot lose.

The node's tasks that must not run without a manager count on one within three seconds (``last_resort``).
"""
TICK_S_MIN = 0.05
"""Shortest wait for a deadline, so that nodes whose deadlines pass one after another are marked down together."""
TICKS_PER_PERIOD = 10
"""Checks in a heartbeat period, so that a node is marked down at most a thirtieth of its grace too late."""
_UNSEEN_GRACES = 2
"""Grace periods for which a node may have been lost when this manager starts: one until the earlier run would have
marked it down, and one without this manager, after which the leader would have adopted its sessions.
"""
LATE_S = 0.2
"""Delay of a check that counts as time without heartbeats.  A longer one is this manager's own lack of processor time.

It does not grow with the ticks: otherwise nodes of a starved manager would be marked down sooner.
"""
PERIOD_JITTER = 0.1
"""Part of the heartbeat period by which it varies, so that the nodes' heartbeats spread."""


class HeartbeatDeadlines:
    """Own time of this manager, the heartbeat period, and the deadlines of the sessions that follow from them."""

    def __init__(
        self, sessions: Sessions, random: Random, monotonic: Callable[[], float], own: NodeId
    ) -> None:
        """``monotonic`` returns the monotonic time.  ``own`` is the manager's node."""
        self.sessions = sessions
        self._random = random
        self.monotonic = monotonic
        self._own = own
        self._is_alone = False
        self._period_s = DEFAULT_PERIOD_S
        self._configured_grace_s: float | None = None
        self._time = RunningTime(seen_at=monotonic())
        self._tick_s = TICK_S
        self._is_counted = True
        """Whether the last tick counted."""
        self._suspension_left_s = SUSPENDED_S_MAX
        # This manager's start may restore the quorum.
        self._recovers_until = self._time.seconds + RECOVERY_GRACE_S

    # -- time and period ----------------------------------------------------------------------------------------

    @property
    def now(self) -> float:
        """The own time in seconds.  It also passes between two ticks, so that ticks can be rare."""
        return self._time_at(self.monotonic(), is_counted=self._is_counted).seconds

    def next_tick(self, *, is_alone: bool) -> float:
        """Start a tick, and return its length: the seconds until the next check for silent nodes.

        Args:
            is_alone: Whether this is the only manager, which reports missed heartbeats to no other.
        """
        self._is_alone = is_alone
        if is_alone:
            tick_s = until_tick(self.monotonic(), TICK_S_MAX)
        else:
            tick_s = min(max(self._period_s / TICKS_PER_PERIOD, TICK_S), TICK_S_MAX)
        now = self.now
        self._tick_s = min(tick_s, max(self.sessions.next_deadline(now) - now, TICK_S_MIN))
        return self._tick_s

    def configure(self, view: View) -> None:
        """Set the period from the configuration and the number of nodes.

        Not called for every heartbeat, because it counts all nodes.
        """
        skep_nodes, docker_nodes = self.sessions.count()
        configured_s, self._configured_grace_s = configured_heartbeats(view)
        period_s = heartbeat_period(configured_s, skep_nodes=skep_nodes, docker_nodes=docker_nodes)
        if period_s > configured_s and period_s > 1.1 * self._period_s:
            log.info("heartbeat period raised", period_s=round(period_s, 2), nodes=skep_nodes + docker_nodes)
        self._period_s = period_s

    def advance(self, *, has_quorum: bool, is_overloaded: bool) -> None:
        """Advance the own time to the end of the tick, which is now.

        Missed heartbeats do not count without a quorum.  They are also ignored while thousands of nodes reconnect,
        because some were sent ``RetryLater``.
        """
        is_suspended = False
        if has_quorum:
            self._suspension_left_s = suspension_left(
                self._suspension_left_s, self._tick_s, is_overloaded=is_overloaded
            )
            is_suspended = is_overloaded and self._suspension_left_s > 0
        self._is_counted = has_quorum and not is_suspended
        self._time = self._time_at(self.monotonic(), is_counted=self._is_counted)

    def _time_at(self, now: float, *, is_counted: bool) -> RunningTime:
        return self._time.after(now, self._tick_s, late_s=LATE_S, is_current=is_counted)

    def start_recovery(self) -> None:
        """Expect nodes to reconnect from now on after a time without any manager."""
        self._recovers_until = self.now + RECOVERY_GRACE_S

    def _grace_s(self) -> float:
        return grace_period(self._period_s, configured_s=self._configured_grace_s)

    def _grace_after_absence_s(self) -> float:
        return grace_after_absence(self._period_s, configured_s=self._configured_grace_s)

    # -- nodes with a session here ------------------------------------------------------------------------------

    def registering(self, node_id: NodeId) -> AbstractContextManager[None]:
        """Count a node as alive while it registers within the block, and for its grace afterwards."""
        return self.sessions.registering(node_id, lambda: self.now, self._grace_s())

    def begin(self, node_id: NodeId, session_id: SessionId, disconnect: Callable[[], None]) -> LiveSession:
        """Return the new session of a node that has registered.  Its earlier one ends."""
        now = self.now
        session = LiveSession(node_id, session_id, disconnect, deadline=now + self._grace_s(), last_seen=now)
        self.sessions.add(session)
        return session

    def record_heartbeat(self, session: LiveSession, *, is_away: bool = False) -> float:
        """Record a heartbeat, the last one if ``is_away``.  Returns the seconds until the next one."""
        is_near = self._is_alone and session.node_id == self._own
        session.period_s = max(self._period_s, OWN_PERIOD_S if is_near else 0.0)
        period_s = session.period_s * self._random.uniform(1 - PERIOD_JITTER, 1 + PERIOD_JITTER)
        session.last_seen = self.now
        grace = grace_when_away if is_away else grace_period
        session.deadline = session.last_seen + grace(period_s, configured_s=self._configured_grace_s)
        if is_away:
            log.info("node announced a planned stop", node=session.node_id)
        return period_s

    def extend_after_crash(self, session: LiveSession) -> None:
        """Let a node whose process ended have the grace of a planned stop.

        Its kernel closed the connection, so the machine still runs.
        """
        grace_s = grace_when_away(self._period_s, configured_s=self._configured_grace_s)
        session.deadline = max(session.deadline, self.now + grace_s)
        log.info("node process ended", node=session.node_id, grace_s=grace_s)

    def extend(self, node_id: NodeId) -> None:
        """Record that a node is alive, because it is registering with another manager."""
        self.sessions.extend(node_id, self.now, self._grace_s())

    # -- nodes that are expected to reconnect -------------------------------------------------------------------

    def expect_after_restart(self, node_id: NodeId, session_id: SessionId) -> None:
        """Expect a node that had its session with an earlier run of this manager."""
        self._expect(node_id, session_id, self._grace_after_absence_s())

    def expect_adopted(self, node_id: NodeId, session_id: SessionId, *, is_skep: bool) -> None:
        """Expect a node whose session this manager adopted from a lost one."""
        grace_s = grace_after_adoption(
            self._period_s,
            is_skep=is_skep,
            recovers=self.now < self._recovers_until,
            configured_s=self._configured_grace_s,
        )
        self._expect(node_id, session_id, grace_s)

    def _expect(self, node_id: NodeId, session_id: SessionId, grace_s: float) -> None:
        self.sessions.expect(
            node_id,
            session_id,
            last_seen=self.now,
            grace_s=grace_s,
            unseen_s=_UNSEEN_GRACES * self._grace_s(),
        )

    def redirect(self, node_id: NodeId) -> None:
        """End a node's session so that it connects to another manager."""
        error = Unavailable("this manager has more than its share of nodes")
        self.sessions.redirect(node_id, error, now=self.now, grace_s=self._grace_after_absence_s())

    def release_all(self, error: SkepError) -> int:
        """End all sessions so that the nodes connect to other managers.  Returns their number."""
        return self.sessions.release_all(error, now=self.now, grace_s=self._grace_after_absence_s())

    # -- expired deadlines ---------------------------------------------------------------------------------------

    def has_passed(self, session: LiveSession) -> bool:
        """Whether the node's deadline has passed."""
        return session.deadline <= self.now

    def missed(self) -> int:
        """Return how many nodes have missed a heartbeat."""
        return self.sessions.missed(self.now, self._period_s)

    def movable(self) -> Sequence[NodeId]:
        """Return the nodes that have missed no heartbeat and can find another manager if they are redirected."""
        return self.sessions.movable(self.now, self._period_s)

    def silent(self, *, with_others: bool) -> list[SilentNode]:
        """Return the nodes whose deadlines have passed.  See ``Sessions.silent``."""
        return self.sessions.silent(self.now, with_others=with_others)


class Heartbeats:
    """Heartbeats of Docker's engines, one call each, and of Skep nodes, on a stream with their load and usage."""

    def __init__(self, deadlines: HeartbeatDeadlines) -> None:
        self._deadlines = deadlines

    def services(self) -> Sequence[Handler]:
        """Return the handlers for ``wire.server.serve``."""
        return unary(methods.HEARTBEAT, self._heartbeat), both_stream(methods.HEARTBEATS, self._heartbeats)

    async def _heartbeat(self, request: pb.HeartbeatRequest, caller: Caller) -> pb.HeartbeatResponse:
        session = self._deadlines.sessions.require(caller.node_id, request.session_id)
        period_s = self._deadlines.record_heartbeat(session)
        return pb.HeartbeatResponse(period=duration_to_pb(int(period_s * SECOND_NS)))

    async def _heartbeats(
        self, requests: AsyncIterator[skep.Heartbeat], caller: Caller
    ) -> AsyncIterator[skep.HeartbeatPeriod]:
        session = None
        try:
            async for request in requests:
                session = self._deadlines.sessions.require(caller.node_id, request.session_id)
                session.is_skep = True
                if request.HasField("load"):
                    session.load = load_from_heartbeat(request.load)
                if request.usages or session.usages:
                    session.usages = usages_from_pb(request.usages, frozenset(session.measured))
                if request.requests or session.requests:
                    session.requests = requests_from_pb(request.requests[:REQUESTS_MAX])
                session.routes = routes_from_pb(request.routes)
                if request.service_requests or session.service_requests:
                    reported = request.service_requests[:REQUESTS_MAX]
                    session.service_requests = reported_requests_from_pb(reported)
                if request.idle or session.idle:
                    session.idle = idle_from_pb(request.idle[:IDLE_MAX]).get(NodeId(""), {})
                    session.idle_at = self._deadlines.monotonic()
                period_s = self._deadlines.record_heartbeat(session, is_away=request.away)
                yield skep.HeartbeatPeriod(
                    period=duration_to_pb(int(period_s * SECOND_NS)), measured=session.measured
                )
                del request
        finally:
            if session is not None and caller.has_crashed():
                self._deadlines.extend_after_crash(session)
