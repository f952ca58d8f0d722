"""The sessions this manager holds, in memory: who is there, until when, and what its streams have to look at.

Nothing here waits or writes; ``loop.py`` does.  What a stream has to look at is a set of task ids, so it is bounded
by the node's tasks however slowly the node reads.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import inf

import msgspec

from skep.aio.event import Event
from skep.errors import SkepError
from skep.manager.dispatcher.registration import NotRegistered, SessionInvalid, Silence
from skep.model.ids import NodeId, SessionId, TaskId

MISSED_PERIODS = 1.5
"""A node that was not heard for so long has missed a heartbeat: their jitter is a tenth."""


class Line:
    """What one open stream has to look at."""

    __slots__ = ("_changed", "_event")

    def __init__(self) -> None:
        self._changed: set[TaskId] = set()
        self._event = Event()

    def wake(self, task_ids: Iterable[TaskId] = ()) -> None:
        """Something changed; ``task_ids`` among it."""
        self._changed.update(task_ids)
        self._event.set()

    async def wait(self) -> set[TaskId]:
        """Wait until something changed; gives the tasks that did, which may be none."""
        await self._event.wait()
        self._event.clear()
        changed, self._changed = self._changed, set()
        return changed


class LiveSession:
    """One node's session with this manager."""

    __slots__ = (
        "_disconnect",
        "_error",
        "_lines",
        "deadline",
        "heard",
        "id",
        "is_skep",
        "load",
        "load_written",
        "messages",
        "node_id",
    )

    def __init__(
        self,
        node_id: NodeId,
        id: SessionId,
        disconnect: Callable[[], None],
        *,
        deadline: float,
        heard: float = 0.0,
    ) -> None:
        self.node_id = node_id
        self.id = id
        self.deadline = deadline
        """In the owner's own time: the node is down when no heartbeat came until then."""
        self.heard = heard
        """In the owner's own time: when the last heartbeat came."""
        self.is_skep = False
        """Whether it heartbeats on a stream; Docker's engines cannot."""
        self.load: float | None = None
        """The share of the node in use as its last heartbeat said, 0 to 1; None: it has said nothing."""
        self.load_written: float | None = None
        """On the manager's clock: when a load was last written in this session."""
        self.messages = Line()
        """Wakes the stream of session messages."""
        self._disconnect = disconnect
        # Ordered, unlike a set: a simulation must run the same way twice.
        self._lines: dict[Line, bool] = {self.messages: False}
        """Every line, and whether it hears of assignments."""
        self._error: SkepError | None = None

    @contextmanager
    def line(self) -> Iterator[Line]:
        """A line for one stream of assignments, for as long as the stream is open."""
        with self._opened(hears_assignments=True) as line:
            yield line

    @contextmanager
    def aside(self) -> Iterator[Line]:
        """A line for a stream of something else: whoever opens it wakes it, and the session's end does."""
        with self._opened(hears_assignments=False) as line:
            yield line

    @contextmanager
    def _opened(self, *, hears_assignments: bool) -> Iterator[Line]:
        line = Line()
        self._lines[line] = hears_assignments
        try:
            yield line
        finally:
            self._lines.pop(line, None)

    def wake_assignments(self, task_ids: Iterable[TaskId]) -> None:
        ids = tuple(task_ids)
        for line, hears_assignments in self._lines.items():
            if hears_assignments:
                line.wake(ids)

    def require_open(self) -> None:
        """Raises: what ended the session."""
        if self._error is not None:
            raise self._error

    def end(self, error: SkepError) -> None:
        """End all streams of the session with ``error``."""
        self._error = error
        for line in self._lines:
            line.wake()

    def cut(self, error: SkepError) -> None:
        """End the session and its connection: the peer may not be reading any more."""
        self.end(error)
        self._disconnect()


class Absence(msgspec.Struct, frozen=True, kw_only=True):
    """A node whose session this manager still owns by the store, though it is not connected."""

    session_id: SessionId
    deadline: float
    heard: float
    """Since when it is expected, or when it was last heard."""


class Sessions:
    """All sessions of this manager, one per node at most."""

    def __init__(self) -> None:
        self._live: dict[NodeId, LiveSession] = {}
        self._absent: dict[NodeId, Absence] = {}

    def add(self, session: LiveSession) -> None:
        """A node has registered; an earlier session of it ends."""
        self._absent.pop(session.node_id, None)
        earlier = self._live.get(session.node_id)
        self._live[session.node_id] = session
        if earlier is not None:
            earlier.end(SessionInvalid())

    def require(self, node_id: NodeId, session_id: str) -> LiveSession:
        """The node's session.  Raises: NotRegistered; SessionInvalid: it has a later one."""
        session = self._live.get(node_id)
        if session is None:
            raise NotRegistered
        if session.id != session_id:
            raise SessionInvalid
        return session

    def live(self, node_id: NodeId) -> LiveSession | None:
        return self._live.get(node_id)

    def all(self) -> Iterator[LiveSession]:
        yield from self._live.values()

    def lose(self, node_id: NodeId, session_id: SessionId | None, error: SkepError) -> None:
        """Another manager has the node's session (``session_id``), or the node is gone (None)."""
        absence = self._absent.get(node_id)
        if absence is not None and absence.session_id != session_id:
            del self._absent[node_id]
        session = self._live.get(node_id)
        if session is not None and session.id != session_id:
            del self._live[node_id]
            session.end(error)

    def expect(self, node_id: NodeId, session_id: SessionId, *, heard: float, grace_s: float) -> None:
        """Wait for a node that is not connected for ``grace_s`` after it was ``heard`` (own time).

        One that is waited for already gets no more time.
        """
        known = self._absent.get(node_id)
        if node_id not in self._live and (known is None or known.session_id != session_id):
            self._absent[node_id] = Absence(session_id=session_id, deadline=heard + grace_s, heard=heard)

    def skep_nodes(self) -> list[NodeId]:
        """Nodes of ours that are connected."""
        return [session.node_id for session in self._live.values() if session.is_skep]

    def send_on(self, node_id: NodeId, error: SkepError, *, now: float, grace_s: float) -> None:
        """End one node's session so that it looks for another manager."""
        session = self._live.pop(node_id, None)
        if session is not None:
            self.expect(node_id, session.id, heard=now, grace_s=grace_s)
            session.end(error)

    def release_all(self, error: SkepError, *, now: float, grace_s: float) -> int:
        """End all sessions so that the nodes look for another manager; gives how many."""
        released = list(self._live.values())
        self._live.clear()
        for session in released:
            self.expect(session.node_id, session.id, heard=now, grace_s=grace_s)
            session.cut(error)
        return len(released)

    def silent(self, now: float, period_s: float = inf) -> list[Silence]:
        """Nodes whose grace has passed at ``now`` (own time), in order of their ids.

        ``period_s``: between heartbeats; who was not heard for half a period more than that has missed one.
        """
        # Thousands are looked at five times a second: those who were heard cost no tuple each.
        live = [
            (id, session.id, session.heard) for id, session in self._live.items() if session.deadline <= now
        ]
        absent = [
            (id, absence.session_id, absence.heard)
            for id, absence in self._absent.items()
            if absence.deadline <= now
        ]
        if not live and not absent:
            return []
        missed = sum([now - session.heard > MISSED_PERIODS * period_s for session in self._live.values()])
        return [
            Silence(node_id=node_id, session_id=session_id, silent_s=now - heard, is_together=missed > 1)
            for node_id, session_id, heard in sorted([*live, *absent])
        ]

    def is_silent(self, silence: Silence, now: float) -> bool:
        """Whether what was found silent still is at ``now`` (own time)."""
        session = self._live.get(silence.node_id)
        if session is not None and session.id == silence.session_id:
            return session.deadline <= now
        absence = self._absent.get(silence.node_id)
        return absence is not None and absence.session_id == silence.session_id and absence.deadline <= now

    def forget(self, silence: Silence, error: SkepError) -> None:
        """The node was written down as down: its session is over, and its connection with it."""
        absence = self._absent.get(silence.node_id)
        if absence is not None and absence.session_id == silence.session_id:
            del self._absent[silence.node_id]
        session = self._live.get(silence.node_id)
        if session is not None and session.id == silence.session_id:
            del self._live[silence.node_id]
            session.cut(error)

    def count(self) -> tuple[int, int]:
        """How many Skep nodes and how many others are connected."""
        skep_nodes = sum([session.is_skep for session in self._live.values()])
        return skep_nodes, len(self._live) - skep_nodes
