"""State of the loop for notifications: which objects have problems, and which have to be read again."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from random import Random
from typing import Final

from skep.aio.clock import Clock
from skep.manager.control_loops.failures import Failures
from skep.manager.control_loops.work_queue import WorkQueue
from skep.manager.notify.incidents import IncidentChanges, ProblemTimes
from skep.manager.notify.problems import Problem
from skep.manager.notify.records import BACKUP_ID, TARGETS_ID, Incident, Target, incidents_in, targets_in
from skep.manager.verify.records import VIOLATIONS_ID
from skep.manager.view.building import GLOBALS, affected_by
from skep.manager.view.followed_rows import global_services
from skep.manager.view.table import Key
from skep.model.node import Node
from skep.model.service import Service
from skep.model.swarm import Swarm
from skep.model.task import Task
from skep.model.values.ids import NodeId, ServiceId
from skep.store.interface import Commit, Created, Deleted, Updated, View
from skep.store.kinds import Payload

WATCHED = (Service, Task, Node, Swarm, Payload)
CLUSTER: Final = "cluster"
"""Key of the problems that belong to no node or service: certificates, backups and invariants."""
STEP: Final = "step"
"""Key of the step that begins and ends incidents and sends messages."""
GATHER_S = 1.0
"""Seconds from a change of an object until it is read.  During a deploy, a service changes many times in a second."""
RECHECK_S = 15.0
"""Seconds after which an object with a problem is read again.  The end of a crash loop does not change the store."""
CLUSTER_S = 60.0
"""Seconds between two checks of certificates and backups, which are days before they expire."""


class NotifyState:
    """Problems of all objects.  Empty without targets."""

    def __init__(self, view: Callable[[], View], clock: Clock, random: Random) -> None:
        self._view = view
        self._clock = clock
        self.queue: WorkQueue[str] = WorkQueue(clock)
        self.failures = Failures(clock, random)
        self._problems: dict[str, dict[str, Problem]] = {}
        """Problems by the key of their object and their own.  Objects without problems have no entry."""
        self._unread: set[str] = set()
        """Objects that were not read since the start, so it is unknown whether their problems are over."""
        self._times = ProblemTimes()
        self._targets: tuple[Target, ...] = ()

    def start(self, snapshot: View) -> Iterator[None]:
        """Queue every object, if there are targets."""
        self._begin(snapshot)
        yield

    def _begin(self, view: View) -> None:
        self._problems.clear()
        self._unread.clear()
        self._times = ProblemTimes()
        self._targets = targets_in(view)
        self.queue.add((STEP,))
        if self._targets:
            self._unread.update(map(object_key, incidents_in(view)))
            self._unread.update((CLUSTER, *(f"node/{id}" for id in view.ids(Node))))
            self._unread.update(f"service/{id}" for id in view.ids(Service))
            self.queue.add(sorted(self._unread))

    def on_commit(self, commit: Commit) -> None:
        """Queue the objects whose problems may change."""
        view = self._view()
        for event in commit.events:
            match event:
                case Created(Payload(id=id)) | Updated(_, Payload(id=id)) | Deleted(Payload(id=id)) if (
                    id == TARGETS_ID
                ):
                    self._note_targets(view)
                case Created(Payload(id=id)) | Updated(_, Payload(id=id)) if id in (BACKUP_ID, VIOLATIONS_ID):
                    self.queue.add((CLUSTER,))
                case Created(Payload()) | Updated(_, Payload()) | Deleted(Payload()):
                    continue
                case _ if self._targets:
                    self._queue_later(affected_by(event, view), view)

    def _note_targets(self, view: View) -> None:
        if not self._targets:
            self._begin(view)
        self._targets = targets_in(view)
        self.queue.add((STEP,))

    def _queue_later(self, rows: Iterable[Key], view: View) -> None:
        at, found = self._clock.monotonic() + GATHER_S, set(rows)
        for row in sorted(found | global_services(found & {GLOBALS}, view)):
            if row.kind in ("nodes", "services") and row.id:
                self.queue.add_at(f"{row.kind.removesuffix('s')}/{row.id}", at)

    @property
    def is_active(self) -> bool:
        """Return whether there are targets."""
        return bool(self._targets)

    def note(self, key: str, problems: Iterable[Problem]) -> None:
        """Record the problems of an object, and queue it again if it has some."""
        now, found = self._clock.monotonic(), {one.key: one for one in problems}
        self._unread.discard(key)
        self._problems.pop(key, None)
        if found:
            self._problems[key] = found
        if key == CLUSTER:
            self.queue.add_at(key, now + CLUSTER_S)
        elif found:
            self.queue.add_at(key, now + RECHECK_S)

    def read_later(self, key: str) -> None:
        """Read an object again after a while.  A repair may not show as a change of it."""
        self.queue.add_at(key, self._clock.monotonic() + RECHECK_S)

    def due(self, incidents: Mapping[str, Incident]) -> IncidentChanges:
        """Return the changes of incidents that are due, and queue the next step."""
        now = self._clock.monotonic()
        problems = {key: one for found in self._problems.values() for key, one in found.items()}
        unknown = [key for key in incidents if object_key(key) in self._unread]
        changes, next_at = self._times.due(problems, incidents, unknown, now=now, now_ns=self._clock.now_ns())
        if next_at < float("inf"):
            self.queue.add_at(STEP, next_at)
        return changes


def object_key(problem: str) -> str:
    """Return the key of the object that has the problem with this key."""
    kind, _, id = problem.partition("/")
    return {
        "node": f"node/{id}",
        "disk": f"node/{id}",
        "service": f"service/{id}",
        "deploy": f"service/{id}",
    }.get(kind, CLUSTER)


def node_of(key: str) -> NodeId | None:
    """Return the node of an object's key, or None."""
    return NodeId(key.removeprefix("node/")) if key.startswith("node/") else None


def service_of(key: str) -> ServiceId | None:
    """Return the service of an object's key, or None."""
    return ServiceId(key.removeprefix("service/")) if key.startswith("service/") else None
