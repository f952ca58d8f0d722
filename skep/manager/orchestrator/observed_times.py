"""Times at which this leader first observed events.  Restart delays, windows and monitor times use no other times.

Timestamps in objects come from the clocks of other machines and are only for display.  Events before the term count as
observed at its start, so a new leader starts every delay again.  That is correct for delays only.  Code that counts
events or measures a duration must first check ``saw_created``, ``saw_end`` and ``saw_start``.  Otherwise every old
restart would count as if it had just happened.
"""

from math import inf

from skep.model.node import Node, NodeState
from skep.model.options.dependencies import is_wait
from skep.model.service import PAUSED, UNDER_WAY, Service
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId, ServiceId, TaskId
from skep.model.values.times import SECOND_NS, unix_ns
from skep.store.interface import Commit, Created, Deleted, Updated

STABLE_S = 10.0
"""A task that ran for this many seconds before it ended is not part of a crash loop."""
NEVER_RAN = "starting"
"""Message of a task that failed before it ran, for example because it never became healthy.  The node keeps the last
message.

Source: swarmkit, agent/exec/controller.go (Do).
"""


class ObservedTimes:
    """First observations of task stages and of nodes going down, in seconds on the leader's monotonic clock."""

    def __init__(self, began: float) -> None:
        """Start without observations.  ``began`` is the time of the watch's snapshot."""
        self._began = began
        self.created_times: dict[TaskId, float] = {}
        self._waited: dict[TaskId, float] = {}
        """Times at which tasks stopped waiting for other services or, if they were prepared, for their start."""
        self._placeable: set[TaskId] = set()
        """Tasks without a node that some node could take at the last decision, maybe after a wait."""
        self._unplaceable: dict[TaskId, float] = {}
        """Times at which the last node was lost that could take a task."""
        self._running: dict[TaskId, float] = {}
        self._ran_at_start: set[TaskId] = set()
        """Tasks that were running when the term began."""
        self._retired: dict[TaskId, float] = {}
        self._ended: dict[TaskId, float] = {}
        self._down: dict[NodeId, float] = {}
        self._back: dict[NodeId, float] = {}
        self._resumed: dict[ServiceId, float] = {}
        self._stepped: dict[ServiceId, float] = {}

    def created(self, task: Task) -> float:
        """Return when the task appeared."""
        return self.created_times.get(task.id, self._began)

    def could_start(self, task: Task) -> float | None:
        """Return since when the task can start, or None while it waits for another service."""
        if is_waiting(task):
            return None
        return self._waited.get(task.id, self.created(task))

    def unplaceable(self, task: Task) -> float:
        """Return when the last node was lost that could take the task, or minus infinity if there was never one."""
        return self._unplaceable.get(task.id, -inf)

    def note_unplaceable(self, task: Task, *, is_unplaceable: bool, now: float) -> None:
        """Record whether no node can take the task, which the caller has found out from the nodes."""
        if not is_unplaceable:
            self._placeable.add(task.id)
            self._unplaceable.pop(task.id, None)
        elif task.id in self._placeable:
            self._placeable.discard(task.id)
            self._unplaceable[task.id] = now

    def running(self, task: Task) -> float | None:
        """Return when the task was first observed running, or None if this leader never saw it running."""
        if task.id in self._running:
            return self._running[task.id]
        return self._began if task.status.state is TaskState.RUNNING else None

    def saw_created(self, task: Task) -> bool:
        """Return whether the task was created in this term."""
        return task.id in self.created_times

    def saw_start(self, task: Task) -> bool:
        """Return whether ``running`` is the actual start of the task and not the start of the term."""
        return task.id in self._running and task.id not in self._ran_at_start

    def saw_end(self, task: Task) -> bool:
        """Return whether the task ended in this term."""
        return task.id in self._ended

    def is_unseen(self, task: Task, monitor_s: float) -> bool:
        """Return whether this leader does not know how long an ended task ran, because it ran or ended before the
        term.
        """
        if not self.saw_end(task):
            return task.status.state.is_terminal
        ran_at, ended_at = self.running(task), self.ended(task)
        if ran_at is None or ended_at is None or self.saw_start(task):
            return False
        return ended_at - ran_at <= monitor_s

    def retired(self, task: Task) -> float:
        """Return when the task was first observed to be retired.  Only valid for retired tasks."""
        return self._retired.get(task.id, self._began)

    def ended(self, task: Task) -> float | None:
        """Return when the task was first observed to have ended, or None while it has not."""
        if not task.status.state.is_terminal:
            return None
        return self._ended.get(task.id, self._began)

    def was_stable(self, task: Task, now: float) -> bool:
        """Return whether the task ran for ``STABLE_S``, by its own timestamps if only an earlier leader saw it start.

        Those timestamps come from two machines' clocks.  They only decide about a delay of seconds, once per change of
        leader.
        """
        ran_at, until = self.running(task), self._ended.get(task.id, now)
        if ran_at is not None and until - ran_at >= STABLE_S:
            return True
        if self.saw_created(task) or self.saw_start(task) or not task.status.state.is_terminal:
            return False
        if task.status.message.partition(";")[0] == NEVER_RAN:  # warnings may follow
            return False
        waited = task.restart.delay if task.restart is not None else 0
        return unix_ns(task.status.timestamp) - unix_ns(task.created_at) - waited >= STABLE_S * SECOND_NS

    def down(self, node: Node) -> float:
        """Return when the node was first observed down since it was last up."""
        return self._down.get(node.id, self._began)

    def back(self, node: Node) -> float:
        """Return when the node last stopped being down, or minus infinity if not in this term."""
        return self._back.get(node.id, -inf)

    def resumed(self, id: ServiceId) -> float:
        """Return when a user last resumed the service's update, or minus infinity if not in this term."""
        return self._resumed.get(id, -inf)

    def stepped(self, id: ServiceId) -> float:
        """Return when the present step of the service's staged update began."""
        return self._stepped.get(id, self._began)

    def record(self, commit: Commit, now: float) -> None:
        """Record first observations in ``commit``."""
        for event in commit.events:
            match event:
                case Created(Task() as task):
                    self.created_times[task.id] = now
                    self._record_state(task, now)
                case Updated(Task() as old, Task() as task):
                    if old.status.state is TaskState.RUNNING and task.id not in self._running:
                        self._running[task.id] = self._began
                        self._ran_at_start.add(task.id)
                    is_started = old.desired_state is TaskState.READY < task.desired_state and task.is_wanted
                    if is_started or (is_waiting(old) and not is_waiting(task)):
                        self._waited[task.id] = now
                    if old.is_wanted and not task.is_wanted:
                        self._retired.setdefault(task.id, now)
                    if not old.status.state.is_terminal:  # otherwise it may have ended before the term
                        self._record_state(task, now)
                case Updated(Node() as before, Node() as node) if before.status.state != node.status.state:
                    self._down.pop(node.id, None)
                    if node.status.state is NodeState.DOWN:
                        self._down[node.id] = now
                    elif before.status.state is NodeState.DOWN:
                        self._back[node.id] = now
                case Deleted(Node() as node):
                    self._down.pop(node.id, None)
                    self._back.pop(node.id, None)
                case Updated(Service() as before_, Service() as service):
                    if _is_resumed(before_, service):
                        self._resumed[service.id] = now
                    if step_of(before_) != step_of(service):
                        self._stepped[service.id] = now
                case Deleted(Service() as service):
                    self._resumed.pop(service.id, None)
                    self._stepped.pop(service.id, None)
                case Deleted(Task() as task):
                    for stamps in (
                        self.created_times,
                        self._waited,
                        self._unplaceable,
                        self._running,
                        self._retired,
                        self._ended,
                    ):
                        stamps.pop(task.id, None)
                    self._placeable.discard(task.id)
                    self._ran_at_start.discard(task.id)

    def _record_state(self, task: Task, now: float) -> None:
        if task.status.state is TaskState.RUNNING:
            self._running.setdefault(task.id, now)
        elif task.status.state.is_terminal:
            self._ended.setdefault(task.id, now)


def _is_resumed(before: Service, after: Service) -> bool:
    old, new = before.update_status, after.update_status
    return old is not None and new is not None and old.state in PAUSED and new.state in UNDER_WAY


def step_of(service: Service) -> int | None:
    """Return the step of the service's staged update, or None if it has none."""
    return service.split.step if service.split is not None else None


def is_waiting(task: Task) -> bool:
    """Return whether the task waits for another service (``skep.depends-on``) that may still become ready."""
    status = task.status
    return status.state <= TaskState.PENDING and is_wait(status.err)
