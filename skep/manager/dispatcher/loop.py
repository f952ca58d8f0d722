"""The dispatcher: node sessions, assignments to nodes, and statuses from nodes.  Active on every manager.

Decisions are in the other modules of this package.  This module has the parts that wait: streams to nodes, the store's
watch, and the clock.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from hashlib import sha256
from random import Random

import structlog

from skep.aio.clock import Clock
from skep.aio.event_loop.hang_detection import RunningTime
from skep.errors import Unavailable
from skep.manager.control_loops.failures import isolated
from skep.manager.control_loops.informer import run_informer
from skep.manager.dispatcher.changed_labels import ChangedLabels
from skep.manager.dispatcher.delayed_stops import Stops, WaitUnused
from skep.manager.dispatcher.loads import Loads, load_from_heartbeat
from skep.manager.dispatcher.node_reports import NodeReports
from skep.manager.dispatcher.node_sessions.admission import RegistrationQueue
from skep.manager.dispatcher.node_sessions.balancing import Balancing
from skep.manager.dispatcher.node_sessions.down_nodes import mark_nodes_down, revert
from skep.manager.dispatcher.node_sessions.liveness import (
    RECOVERY_GRACE_S,
    SUSPENDED_S_MAX,
    grace_after_absence,
    grace_after_adoption,
    grace_when_away,
    heartbeat_period,
    suspension_left,
)
from skep.manager.dispatcher.node_sessions.messages import ManagerPeer, managers_of, session_message
from skep.manager.dispatcher.node_sessions.registration import (
    NotRegistered,
    Registration,
    RegistrationRate,
    SessionInvalid,
    SilentNode,
    take_session,
)
from skep.manager.dispatcher.node_sessions.sessions import LiveSession, Sessions
from skep.manager.dispatcher.streams import AssignmentStreams
from skep.manager.dispatcher.usages import MeasuredTasks
from skep.manager.nodes.heartbeats import DEFAULT_PERIOD_S, configured_heartbeats, grace_period
from skep.manager.peer_reports import REGISTERING_MAX, PeerReport, PeerReports
from skep.manager.services.volume_index import VolumeIndex
from skep.model.networks.data_planes import is_docker_node
from skep.model.networks.gossip import GossipKey, decoded_keys
from skep.model.node import Node, NodeState, differ_in_load_alone
from skep.model.options.autoscaling import TaskUsage
from skep.model.service import Service
from skep.model.swarm import Swarm
from skep.model.task import Task
from skep.model.values.ids import ClusterId, IdSource, NodeId, SessionId, TaskId
from skep.model.values.times import SECOND_NS
from skep.model.volume import Volume
from skep.store.interface import Commit, Created, Deleted, Store, Updated, View
from skep.store.kinds import GOSSIP_KEYS_ID, Payload
from skep.wire import methods
from skep.wire import skep_pb2 as skep
from skep.wire import swarm_pb2 as pb
from skep.wire.access import Caller
from skep.wire.convert.node import description_from_pb
from skep.wire.convert.usages import usages_from_pb
from skep.wire.convert.values import duration_to_pb
from skep.wire.service import Handler, both_stream, server_stream, unary

log = structlog.get_logger(__name__)

TICK_S, TICK_S_MAX = 0.2, 0.5
"""Minimum and maximum seconds between checks for silent nodes."""
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
CURRENT_CHECK_S = 0.5
"""Seconds between checks for a quorum."""
CURRENT_WITHIN_S = 2.0
"""A manager that cannot reach a quorum for so many seconds ends its sessions, so that its nodes reconnect elsewhere."""
NO_QUORUM = "this manager has lost contact with the others"
PERIOD_JITTER = 0.1
"""Part of the heartbeat period by which it varies, so that the nodes' heartbeats spread."""


class Dispatcher:
    """Sends nodes their tasks and records their reports."""

    def __init__(
        self,
        store: Store,
        own: ManagerPeer,
        clock: Clock,
        new_id: IdSource,
        random: Random,
        wait_unused: WaitUnused | None = None,
        reports: PeerReports | None = None,
    ) -> None:
        """Create a dispatcher.

        Args:
            own: This manager, as nodes reach it.
            wait_unused: See ``Stops``.  Without it, tasks are stopped without draining.
            reports: Reports of and for the other managers, or None for a single manager.
        """
        self._store = store
        self._own = own
        self._clock = clock
        self._new_id = new_id
        self._random = random
        self._reports = reports or PeerReports()
        self._sessions = Sessions()
        self._volumes = VolumeIndex()
        self._assignments = AssignmentStreams(store, self._sessions, self._volumes)
        self._stops = Stops(store, self._sessions, clock, wait_unused)
        self._labels = ChangedLabels(store, clock, self._stops.wake)
        self._balancing = Balancing(
            store,
            own.node_id,
            self._sessions,
            clock,
            redirect=self._redirect,
            movable=self._movable,
        )
        self._loads = Loads(store, self._sessions.all, self._sessions.live, clock)
        self._node_reports = NodeReports(store, self._sessions, clock)
        self._usages = MeasuredTasks(store, self._sessions, clock)
        self._suspension_left_s = SUSPENDED_S_MAX
        self._admission = RegistrationQueue(clock, random)
        self._rate = RegistrationRate()
        self._managers: tuple[ManagerPeer, ...] = (own,)
        self._time = RunningTime(seen_at=clock.monotonic())
        self._recovers_until = self._time.seconds + RECOVERY_GRACE_S
        """Own time until which nodes may be reconnecting after a time without any manager.

        This manager's start may restore the quorum.
        """
        self._shown_down: set[NodeId] = set()
        """Nodes with a session here that were shown as down."""
        self._is_current = True
        self._current_at = clock.monotonic()
        self._period_s = DEFAULT_PERIOD_S
        self._configured_grace_s: float | None = None

    def services(self) -> Sequence[Handler]:
        """Return the handlers for ``wire.server.serve``."""
        return (
            server_stream(methods.SESSION, self._session),
            unary(methods.HEARTBEAT, self._heartbeat),
            both_stream(methods.HEARTBEATS, self._heartbeats),
            *self._assignments.services(),
            *self._usages.services(),
            *self._node_reports.services(),
        )

    def session(self, node_id: NodeId, session_id: str) -> LiveSession:
        """Return a session held here.  Raises NotRegistered, or SessionInvalid if the node has a later session."""
        return self._sessions.require(node_id, session_id)

    def session_count(self) -> int:
        """Return how many nodes have their session here."""
        return sum(self._sessions.count())

    def usages(self) -> Mapping[TaskId, TaskUsage]:
        """Return the reported usage of autoscaled services' tasks on nodes with a session here."""
        return self._usages.present()

    def is_current(self) -> bool:
        """Whether this manager had contact with a quorum within the last ``CURRENT_WITHIN_S``."""
        return self._is_current and self._clock.monotonic() - self._current_at < CURRENT_WITHIN_S

    def without_quorum_s(self) -> float:
        """Return the seconds since the last contact with a quorum.  0 while there is contact."""
        return 0.0 if self.is_current() else max(self._clock.monotonic() - self._current_at, 0.001)

    async def run(self) -> None:
        """Follow the store and mark silent nodes down, until cancelled."""
        try:
            await run_informer(
                self._store,
                (Node, Task, Service, Swarm, Payload, Volume),
                on_snapshot=self._on_snapshot,
                on_commit=self._on_commit,
                work=self._run_tasks,
            )
        finally:
            # A stopping leader waits for the outcome of its writes, and answers pings meanwhile.
            self._reports.own = PeerReport(is_without_quorum=True)

    async def _run_tasks(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._find_silent(), name="find silent nodes")
            group.create_task(self._stay_current(), name="stay current")
            group.create_task(self._balancing.run(), name="spread sessions")
            group.create_task(self._loads.run(), name="write loads")
            group.create_task(self._stops.run(), name="stops")
            group.create_task(self._labels.run(), name="changed labels")
            group.create_task(self._node_reports.run(), name="repeated reports")
            group.create_task(self._usages.run(), name="usage of tasks")

    # -- what changed in the store ------------------------------------------------------------------------------

    def _on_snapshot(self, view: View) -> None:
        """Start from a snapshot: expect the nodes of an earlier run, and wake every stream for everything.

        Objects that were deleted since an earlier snapshot leave no trace in this one.
        """
        nodes = view.find(Node)
        known = {*view.ids(Node), *view.unreadable(Node)}
        for session in tuple(self._sessions.all()):
            if session.node_id not in known:
                self._sessions.lose(session.node_id, None, NotRegistered())
        self._set_period()
        self._managers = managers_of(nodes, self._own)
        grace_s = grace_after_absence(self._period_s, configured_s=self._configured_grace_s)
        for node in nodes:
            with isolated("session", node.id):
                self._on_node(node, grace_s)
        self._volumes.reset(view.find(Volume))
        for session in self._sessions.all():
            session.wake_for_all()

    def _on_commit(self, commit: Commit) -> None:
        has_new_managers = False
        for event in commit.events:
            match event:
                case Created(Task() as task) | Deleted(Task() as task):
                    self._stops.release(task)
                case Updated(Task() as old, Task() as new):
                    self._stops.on_update(old, new, commit.revision)
                case Updated(Service() as before, Service() as service):
                    self._labels.on_update(before, service)
                case Created(Node() as node):
                    has_new_managers |= node.manager_status is not None
                case Updated(Node() as old, Node() as node) if not differ_in_load_alone(old, node):
                    has_new_managers |= old.manager_status != node.manager_status
                    self._on_node(node)
                    if old.attachments != node.attachments:
                        tasks = self._store.view().find(Task, node_id=node.id)
                        self._stops.wake(
                            node.id, (task.id for task in tasks)
                        )  # they may have waited for the attachment
                case Deleted(Node() as node):
                    has_new_managers |= node.manager_status is not None
                    self._sessions.lose(node.id, None, NotRegistered())
                case Created(Volume() as volume):
                    self._wake_for(None, volume)
                case Deleted(Volume() as volume):
                    self._wake_for(volume, None)
                case Updated(Volume() as old, Volume() as volume):
                    self._wake_for(old, volume)
                case Updated(Swarm(), Swarm()):
                    has_new_managers = True  # or new roots, which every session message contains
                case Created(Payload(id=id)) | Updated(_, Payload(id=id)) if id == GOSSIP_KEYS_ID:
                    for session in self._sessions.all():
                        session.messages.wake()
        if has_new_managers:
            self._managers = managers_of(self._store.view().find(Node), self._own)
            for session in self._sessions.all():
                session.messages.wake()

    def _wake_for(self, old: Volume | None, new: Volume | None) -> None:
        """Send a volume's change to the nodes on which it is, or was, published."""
        for node_id in self._volumes.change(old, new):
            if (session := self._sessions.live(node_id)) is not None:
                session.wake_assignments(())

    def _on_node(self, node: Node, grace_s: float | None = None) -> None:
        """Handle a changed node.

        Args:
            node: The node.
            grace_s: Grace if its session is ours and not connected, or None for the grace of its kind.
        """
        held = node.session
        if held is not None:
            self._sessions.lose(node.id, held.session_id, SessionInvalid())
        session = self._sessions.live(node.id)
        if session is not None:
            session.messages.wake()
            if _is_down(node):
                self._shown_down.add(node.id)
        elif held is not None and held.manager_id == self._own.node_id and not _is_down(node):
            # A session of an earlier run of this manager, or adopted from a lost one.
            if grace_s is None:
                grace_s = grace_after_adoption(
                    self._period_s,
                    is_skep=not is_docker_node(node),
                    recovers=self._time.seconds < self._recovers_until,
                    configured_s=self._configured_grace_s,
                )
            self._sessions.expect(
                node.id,
                held.session_id,
                last_seen=self._time.seconds,
                grace_s=grace_s,
                unseen_s=_UNSEEN_GRACES * self._grace_s(),
            )

    # -- sessions -----------------------------------------------------------------------------------------------

    async def _session(self, request: pb.SessionRequest, caller: Caller) -> AsyncIterator[pb.SessionMessage]:
        session = await self._register(request, caller)
        del request  # thousands of these streams wait for hours, so they release unneeded memory
        sent, seen = b"", None
        while True:
            session.require_open()
            view = self._store.view()
            node, swarm = view.lookup(Node, session.node_id), _swarm_of(view)
            if node is None or swarm is None:
                raise NotRegistered
            keys: tuple[GossipKey, ...] = ()
            if is_docker_node(node):
                stored = view.lookup(Payload, GOSSIP_KEYS_ID)
                if stored is None or swarm.id in view.unreadable(Swarm) or not swarm.tls_info.trust_root:
                    # The leader is about to create them.  An engine without keys gossips in clear, and an engine
                    # without a root trusts no manager.
                    await session.messages.wait()
                    continue
                keys = decoded_keys(stored.data).keys
            found = (node, swarm, self._managers, keys, self._balancing.weights)
            if found != seen:  # a node that has just registered is woken by its own registration
                seen = found
                message = session_message(session.id, *found)
                digest = sha256(message.SerializeToString(deterministic=True)).digest()
                if digest != sent:
                    sent = digest
                    yield message
                del message
            await session.messages.wait()

    async def _register(self, request: pb.SessionRequest, caller: Caller) -> LiveSession:
        """Write the session once a slot is free, and return when this replica shows it.  Raises RetryLater."""
        self._rate.note(caller.node_id, self._clock.monotonic())
        if not self._is_current:
            raise Unavailable(NO_QUORUM)
        with self._sessions.registering(caller.node_id, lambda: self._time.seconds, self._grace_s()):
            async with self._admission.slot():
                return await self._take_session(request, caller)

    async def _take_session(self, request: pb.SessionRequest, caller: Caller) -> LiveSession:
        node_id, session_id = caller.node_id, SessionId(self._new_id())
        if self._store.view().lookup(Node, node_id) is None:
            await (
                self._store.barrier()
            )  # its certificate may have been issued by another manager a moment ago
        await self._store.update(
            take_session,
            Registration(
                node_id=node_id,
                manager_id=self._own.node_id,
                session_id=session_id,
                description=description_from_pb(request.description),
                address=caller.address,
            ),
        )
        node = self._store.view().lookup(Node, node_id)
        if node is None or node.session is None or node.session.session_id != session_id:
            raise SessionInvalid  # it registered again meanwhile
        if not self._is_current:
            raise Unavailable(NO_QUORUM)  # the quorum was lost meanwhile, and all sessions have been ended
        now = self._time.seconds
        deadline = now + self._grace_s()
        session = LiveSession(node_id, session_id, caller.disconnect, deadline=deadline, last_seen=now)
        self._sessions.add(session)
        log.info("node registered", node=node_id, session=session_id, peer=caller.address)
        return session

    # -- heartbeats ---------------------------------------------------------------------------------------------

    async def _heartbeat(self, request: pb.HeartbeatRequest, caller: Caller) -> pb.HeartbeatResponse:
        session = self._sessions.require(caller.node_id, request.session_id)
        return pb.HeartbeatResponse(period=duration_to_pb(self._record_heartbeat(session)))

    async def _heartbeats(
        self, requests: AsyncIterator[skep.Heartbeat], caller: Caller
    ) -> AsyncIterator[skep.HeartbeatPeriod]:
        session = None
        try:
            async for request in requests:
                session = self._sessions.require(caller.node_id, request.session_id)
                session.is_skep = True
                if request.HasField("load"):
                    session.load = load_from_heartbeat(request.load)
                if request.usages or session.usages:
                    session.usages = usages_from_pb(request.usages, frozenset(session.measured))
                yield skep.HeartbeatPeriod(
                    period=duration_to_pb(self._record_heartbeat(session, is_away=request.away)),
                    measured=session.measured,
                )
                del request
        finally:
            if session is not None and caller.has_crashed():
                self._extend_grace(session)

    def _extend_grace(self, session: LiveSession) -> None:
        """Let a node whose process ended have the grace of a planned stop.

        Its kernel closed the connection, so the machine still runs.
        """
        grace_s = grace_when_away(self._period_s, configured_s=self._configured_grace_s)
        session.deadline = max(session.deadline, self._time.seconds + grace_s)
        log.info("node process ended", node=session.node_id, grace_s=grace_s)

    def _record_heartbeat(self, session: LiveSession, *, is_away: bool = False) -> int:
        """Record a heartbeat, the last one if ``is_away``.  Returns the nanoseconds until the next one."""
        period_s = self._period_s * self._random.uniform(1 - PERIOD_JITTER, 1 + PERIOD_JITTER)
        session.last_seen = self._time.seconds
        grace = grace_when_away if is_away else grace_period
        session.deadline = session.last_seen + grace(period_s, configured_s=self._configured_grace_s)
        if is_away:
            log.info("node announced a planned stop", node=session.node_id)
        return int(period_s * SECOND_NS)

    def _grace_s(self) -> float:
        return grace_period(self._period_s, configured_s=self._configured_grace_s)

    def _set_period(self) -> None:
        """Set the period from the configuration and the number of nodes.

        Not called for every heartbeat, because it counts all nodes.
        """
        skep_nodes, docker_nodes = self._sessions.count()
        configured_s, self._configured_grace_s = configured_heartbeats(self._store.view())
        period_s = heartbeat_period(configured_s, skep_nodes=skep_nodes, docker_nodes=docker_nodes)
        if period_s > configured_s and period_s > 1.1 * self._period_s:
            log.info("heartbeat period raised", period_s=round(period_s, 2), nodes=skep_nodes + docker_nodes)
        self._period_s = period_s

    async def _find_silent(self) -> None:
        """Mark nodes down that were silent for their grace period."""
        while True:
            tick_s = min(max(self._period_s / TICKS_PER_PERIOD, TICK_S), TICK_S_MAX)
            await self._clock.sleep(tick_s)
            now = self._clock.monotonic()
            self._set_period()
            missed = self._sessions.missed(self._time.seconds, self._period_s)
            self._reports.own = PeerReport(
                is_overloaded=self._admission.is_overloaded(),
                missed=missed,
                registering=self._sessions.registering_now(REGISTERING_MAX),
                is_without_quorum=not self.is_current(),
            )
            is_counted = self._is_current and not self._is_suspended(now, tick_s)
            self._time = self._time.after(now, tick_s, late_s=LATE_S, is_current=is_counted)
            missed += self._reports.missed_elsewhere(now)
            for id in sorted(self._reports.registering_elsewhere(now)):
                self._sessions.extend(id, self._time.seconds, self._grace_s())
            silent = self._sessions.silent(self._time.seconds, with_others=missed > 1)
            if silent:
                await mark_nodes_down(
                    self._store, self._sessions, silent, lambda: self._time.seconds, self._clock.now_ns()
                )
            await self._revert_late_marks()

    async def _revert_late_marks(self) -> None:
        """Mark nodes ready that are shown as down but send heartbeats here.

        A mark whose outcome was unknown may be committed after the next heartbeat.
        """
        for id in sorted(self._shown_down):
            node, session = self._store.view().lookup(Node, id), self._sessions.live(id)
            if node is None or session is None or not _is_down(node):
                self._shown_down.discard(id)
            elif session.deadline > self._time.seconds:
                log.info("heartbeats of a node that is marked down: reverting", node=id)
                await revert(self._store, self._sessions, SilentNode(node_id=id, session_id=session.id))

    def _is_suspended(self, now: float, tick_s: float) -> bool:
        """Whether missed heartbeats are ignored: thousands of nodes reconnect, and some were sent ``RetryLater``."""
        is_overloaded = self._reports.is_overloaded_anywhere(now)
        self._suspension_left_s = suspension_left(
            self._suspension_left_s, tick_s, is_overloaded=is_overloaded
        )
        return is_overloaded and self._suspension_left_s > 0

    async def _stay_current(self) -> None:
        """End all sessions while this manager has no contact with the others.

        A refused barrier alone does not mean that, because etcd refuses waiting reads at once during an election.
        """
        while True:
            await self._clock.sleep(CURRENT_CHECK_S)
            try:
                async with asyncio.timeout(CURRENT_WITHIN_S):
                    await self._store.barrier()
            except (TimeoutError, Unavailable):
                if self._is_current and self._clock.monotonic() - self._current_at >= CURRENT_WITHIN_S:
                    self._is_current = False
                    lost = self._sessions.release_all(
                        Unavailable(NO_QUORUM),
                        now=self._time.seconds,
                        grace_s=grace_after_absence(self._period_s, configured_s=self._configured_grace_s),
                    )
                    log.warning("no quorum: sessions ended", nodes=lost)
            else:
                if not self._is_current:
                    log.info("quorum is back: sessions are accepted")
                    self._recovers_until = self._time.seconds + RECOVERY_GRACE_S
                self._is_current = True
                self._current_at = self._clock.monotonic()

    def _movable(self) -> Sequence[NodeId]:
        """Return the nodes that can find another manager if they are redirected now."""
        if not self._is_current or self._reports.is_overloaded_anywhere(self._clock.monotonic()):
            return ()
        return self._sessions.movable(self._time.seconds, self._period_s)

    def _redirect(self, node_id: NodeId) -> None:
        """End a node's session so that it connects to another manager."""
        grace_s = grace_after_absence(self._period_s, configured_s=self._configured_grace_s)
        error = Unavailable("this manager has more than its share of nodes")
        self._sessions.redirect(node_id, error, now=self._time.seconds, grace_s=grace_s)


def _is_down(node: Node) -> bool:
    return node.status.state is NodeState.DOWN


def _swarm_of(view: View) -> Swarm | None:
    """Return the cluster object, or an empty one if it is unreadable: a node then keeps its last message."""
    found = view.find(Swarm)
    unreadable = view.unreadable(Swarm)
    return found[0] if found else Swarm(id=ClusterId(min(unreadable))) if unreadable else None
