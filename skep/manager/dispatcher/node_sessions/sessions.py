"""The sessions this manager holds, in memory: connected nodes, their deadlines, and their streams' pending work.

Nothing here waits or writes.  A stream's pending work is a set of task ids, so it is
bounded by the node's tasks however slowly the node reads.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from math import inf

import msgspec
from msgspec.structs import replace

from skep.aio.event import Event
from skep.errors import SkepError
from skep.manager.dispatcher.node_sessions.registration import NotRegistered, SessionInvalid, SilentNode
from skep.model.door.traffic import RouteTraffic
from skep.model.measures.readings import ServiceRequests
from skep.model.options.autoscaling import TaskUsage
from skep.model.staging.updates import TaskRequests
from skep.model.values.ids import NodeId, ServiceId, SessionId, TaskId

MISSED_PERIODS = 1.5
"""A node without a heartbeat for so many periods has missed one.  The jitter is a tenth of a period."""


class StreamSignal:
    """Pending work of one open stream."""

    __slots__ = ("_changed", "_event", "_is_all")

    def __init__(self) -> None:
        self._changed: set[TaskId] = set()
        self._is_all = False
        self._event = Event()

    def wake(self, task_ids: Iterable[TaskId] = ()) -> None:
        """Wake the stream because ``task_ids`` have changed."""
        self._changed.update(task_ids)
        self._event.set()

    def wake_for_all(self) -> None:
        """Wake the stream because any task may have changed or been deleted."""
        self._is_all = True
        self._event.set()

    async def wait(self) -> set[TaskId] | None:
        """Wait until woken.  Returns the changed tasks (perhaps none), or None if any may have changed."""
        await self._event.wait()
        self._event.clear()
        changed = None if self._is_all else self._changed
        self._changed, self._is_all = set(), False
        return changed


class LiveSession:
    """A node's session with this manager."""

    __slots__ = (
        "_disconnect",
        "_error",
        "_signals",
        "deadline",
        "id",
        "idle",
        "idle_at",
        "is_skep",
        "last_seen",
        "load",
        "load_written",
        "measured",
        "messages",
        "node_id",
        "period_s",
        "requests",
        "routes",
        "service_requests",
        "usages",
    )

    def __init__(
        self,
        node_id: NodeId,
        id: SessionId,
        disconnect: Callable[[], None],
        *,
        deadline: float,
        last_seen: float = 0.0,
    ) -> None:
        self.node_id = node_id
        self.id = id
        self.deadline = deadline
        """Own time of the manager at which the node counts as down unless a heartbeat arrives."""
        self.last_seen = last_seen
        """Own time of the manager at the last heartbeat."""
        self.period_s = 0.0
        """Heartbeat period at the last heartbeat, or 0 before the first one."""
        self.is_skep = False
        """Whether it heartbeats on a stream, which Docker's engines cannot."""
        self.load: float | None = None
        """The used share of the node in its last heartbeat, 0 to 1, or None if not reported."""
        self.load_written: float | None = None
        """When a load was last written in this session, on the manager's clock."""
        self.measured: tuple[TaskId, ...] = ()
        """Tasks of the node whose usage is measured."""
        self.usages: Mapping[TaskId, TaskUsage] = {}
        """Usage of these tasks in the last heartbeat."""
        self.requests: Mapping[TaskId, TaskRequests] = {}
        """Requests of new tasks over the node's front door, in the last heartbeat."""
        self.routes: Sequence[RouteTraffic] = ()
        """Requests to the routes of the node's front door, in the last heartbeat."""
        self.service_requests: Mapping[ServiceId, ServiceRequests] = {}
        """Requests of autoscaled services over the node's front door, in the last heartbeat."""
        self.idle: Mapping[ServiceId, float] = {}
        """Seconds without a request at the node's front door, of services in the last heartbeat."""
        self.idle_at = 0.0
        """When that heartbeat came, on the manager's monotonic clock."""
        self.messages = StreamSignal()
        """Wakes the stream of session messages."""
        self._disconnect = disconnect
        # Ordered, unlike a set: a simulation must run the same way twice.
        self._signals: dict[StreamSignal, bool] = {self.messages: False}
        """Every signal, and whether it is for assignments."""
        self._error: SkepError | None = None

    @contextmanager
    def assignment_signal(self) -> Iterator[StreamSignal]:
        """Return a signal for an assignment stream, valid while the stream is open."""
        with self._opened(with_assignments=True) as assignment_signal:
            yield assignment_signal

    @contextmanager
    def signal(self) -> Iterator[StreamSignal]:
        """Return a signal for any other stream, set by its owner and when the session ends."""
        with self._opened(with_assignments=False) as assignment_signal:
            yield assignment_signal

    @contextmanager
    def _opened(self, *, with_assignments: bool) -> Iterator[StreamSignal]:
        assignment_signal = StreamSignal()
        self._signals[assignment_signal] = with_assignments
        try:
            yield assignment_signal
        finally:
            self._signals.pop(assignment_signal, None)

    def wake_assignments(self, task_ids: Iterable[TaskId]) -> None:
        """Wake the node's assignment streams for changed tasks."""
        ids = tuple(task_ids)
        for assignment_signal, with_assignments in self._signals.items():
            if with_assignments:
                assignment_signal.wake(ids)

    def wake_for_all(self) -> None:
        """Wake every stream for all tasks, because changes were missed."""
        for assignment_signal in self._signals:
            assignment_signal.wake_for_all()

    def require_open(self) -> None:
        """Raise the error that ended the session, if it has ended."""
        if self._error is not None:
            raise self._error

    def end(self, error: SkepError) -> None:
        """End all streams of the session with ``error``."""
        self._error = error
        for assignment_signal in self._signals:
            assignment_signal.wake()

    def cut(self, error: SkepError) -> None:
        """End the session and its connection, because the peer may have stopped reading."""
        self.end(error)
        self._disconnect()


class Absence(msgspec.Struct, frozen=True, kw_only=True):
    """A node that is not connected although this manager owns its session in the store."""

    session_id: SessionId
    deadline: float
    last_seen: float
    """When this manager began to expect it, or its last heartbeat."""


class Sessions:
    """All sessions of this manager, at most one per node."""

    def __init__(self) -> None:
        self._live: dict[NodeId, LiveSession] = {}
        self.absent: dict[NodeId, Absence] = {}
        self._registering: Counter[NodeId] = Counter()

    def add(self, session: LiveSession) -> None:
        """Add the session of a node that has registered, and end its earlier one."""
        self.absent.pop(session.node_id, None)
        earlier = self._live.get(session.node_id)
        self._live[session.node_id] = session
        if earlier is not None:
            earlier.end(SessionInvalid())

    @contextmanager
    def registering(self, node_id: NodeId, now: Callable[[], float], grace_s: float) -> Iterator[None]:
        """Count a node as alive while it registers within the block, and for ``grace_s`` afterwards (own time).

        The write of its session may take longer than its grace, if this manager or its store lacks processor time.
        """
        self._registering[node_id] += 1
        try:
            yield
        finally:
            self._registering[node_id] -= 1
            if not self._registering[node_id]:
                del self._registering[node_id]
            self.extend(node_id, now(), grace_s)

    def registering_now(self, limit: int) -> tuple[NodeId, ...]:
        """Return up to ``limit`` nodes that are registering, longest first."""
        return tuple(islice(self._registering, limit))

    def extend(self, node_id: NodeId, seen_at: float, grace_s: float) -> None:
        """Record that a node is alive, whether or not it has a session here.

        The time of its last heartbeat stays, because a node that registers receives nothing yet, such as new labels.
        """
        deadline = seen_at + grace_s
        if (session := self._live.get(node_id)) is not None:
            session.deadline = max(session.deadline, deadline)
        if (absence := self.absent.get(node_id)) is not None:
            self.absent[node_id] = replace(absence, deadline=max(absence.deadline, deadline))

    def require(self, node_id: NodeId, session_id: str) -> LiveSession:
        """Return the node's session.  Raises NotRegistered, or SessionInvalid if it has a later one."""
        session = self._live.get(node_id)
        if session is None:
            raise NotRegistered
        if session.id != session_id:
            raise SessionInvalid
        return session

    def live(self, node_id: NodeId) -> LiveSession | None:
        """Return the node's session, or None if it is not connected here."""
        return self._live.get(node_id)

    def all(self) -> Iterator[LiveSession]:
        """Iterate over the sessions of this manager."""
        yield from self._live.values()

    def lose(self, node_id: NodeId, session_id: SessionId | None, error: SkepError) -> None:
        """End a session, because another manager has the node (with ``session_id``) or the node was removed (None)."""
        absence = self.absent.get(node_id)
        if absence is not None and absence.session_id != session_id:
            del self.absent[node_id]
        session = self._live.get(node_id)
        if session is not None and session.id != session_id:
            del self._live[node_id]
            session.end(error)

    def expect(
        self,
        node_id: NodeId,
        session_id: SessionId,
        *,
        last_seen: float,
        grace_s: float,
        unseen_s: float = 0.0,
    ) -> None:
        """Expect a node that is not connected for ``grace_s`` after it was ``last_seen`` (own time).

        A node that is already expected gets no extra time.

        Args:
            unseen_s: Seconds before ``last_seen`` since which the node may have been lost.
        """
        known = self.absent.get(node_id)
        if node_id not in self._live and (known is None or known.session_id != session_id):
            self.absent[node_id] = Absence(
                session_id=session_id, deadline=last_seen + grace_s, last_seen=last_seen - unseen_s
            )

    def movable(self, now: float, period_s: float) -> list[NodeId]:
        """Return the skep nodes that can be redirected at ``now`` (own time), because they have missed no heartbeat.

        A redirected node gets time to find another manager, which a node that may be lost must not get.
        """
        return [
            session.node_id
            for session in self._live.values()
            if session.is_skep and not _has_missed(session, now, period_s)
        ]

    def redirect(self, node_id: NodeId, error: SkepError, *, now: float, grace_s: float) -> None:
        """End one node's session so that it connects to another manager."""
        session = self._live.pop(node_id, None)
        if session is not None:
            self.expect(node_id, session.id, last_seen=now, grace_s=grace_s)
            session.end(error)

    def release_all(self, error: SkepError, *, now: float, grace_s: float) -> int:
        """End all sessions so that the nodes connect to other managers.  Returns their number."""
        released = list(self._live.values())
        self._live.clear()
        for session in released:
            self.expect(session.node_id, session.id, last_seen=now, grace_s=grace_s)
            session.cut(error)
        return len(released)

    def missed(self, now: float, period_s: float) -> int:
        """Return how many nodes have missed a heartbeat at ``now`` (own time), with heartbeats every ``period_s``."""
        return sum([_has_missed(session, now, period_s) for session in self._live.values()])

    def silent(self, now: float, *, with_others: bool = False) -> list[SilentNode]:
        """Return the nodes whose grace has passed at ``now`` (own time), in order of their ids.

        Args:
            with_others: Whether more than one node, of any manager, has missed a heartbeat.
        """
        # Thousands of nodes are checked five times a second, so no tuple is made for nodes that are in time.
        live = [
            (id, session.id, session.last_seen)
            for id, session in self._live.items()
            if session.deadline <= now and id not in self._registering
        ]
        absent = [
            (id, absence.session_id, absence.last_seen)
            for id, absence in self.absent.items()
            if absence.deadline <= now and id not in self._registering
        ]
        if not live and not absent:
            return []
        return [
            SilentNode(
                node_id=node_id, session_id=session_id, silent_s=now - last_seen, with_others=with_others
            )
            for node_id, session_id, last_seen in sorted([*live, *absent])
        ]

    def next_deadline(self, now: float) -> float:
        """Return the earliest deadline after ``now`` (own time), or infinity."""
        live = (session.deadline for session in self._live.values())
        absent = (absence.deadline for absence in self.absent.values())
        return min((deadline for deadline in chain(live, absent) if deadline > now), default=inf)

    def is_silent(self, silent_node: SilentNode, now: float) -> bool:
        """Whether a node that was found silent is still silent at ``now`` (own time)."""
        if silent_node.node_id in self._registering:
            return False
        session = self._live.get(silent_node.node_id)
        if session is not None and session.id == silent_node.session_id:
            return session.deadline <= now
        absence = self.absent.get(silent_node.node_id)
        return (
            absence is not None and absence.session_id == silent_node.session_id and absence.deadline <= now
        )

    def forget(self, silent_node: SilentNode, error: SkepError) -> None:
        """End the session and connection of a node that was marked down."""
        absence = self.absent.get(silent_node.node_id)
        if absence is not None and absence.session_id == silent_node.session_id:
            del self.absent[silent_node.node_id]
        session = self._live.get(silent_node.node_id)
        if session is not None and session.id == silent_node.session_id:
            del self._live[silent_node.node_id]
            session.cut(error)

    def count(self) -> tuple[int, int]:
        """Return the number of connected Skep nodes, and of other nodes."""
        skep_nodes = sum([session.is_skep for session in self._live.values()])
        return skep_nodes, len(self._live) - skep_nodes


def _has_missed(session: LiveSession, now: float, period_s: float) -> bool:
    return now - session.last_seen > MISSED_PERIODS * max(period_s, session.period_s)
