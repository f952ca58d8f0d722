"""Rules on containers, which are evaluated when a machine starts or stops one."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from math import inf

import msgspec

from sim.invariants.nodes.placement import device_violations, port_violations
from sim.invariants.services.schedules import is_retried
from sim.world.committed import Change
from skep.manager.orchestrator.replacement.restart import stop_seconds_max
from skep.manager.verify.tasks import is_on_drained_node, may_start_first
from skep.model.node import Node, NodeState, is_lost
from skep.model.options.labels import ON_DISCONNECT, DisconnectPolicy, OnDisconnect, disconnect_policy
from skep.model.service import Service
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId, ServiceId, TaskId
from skep.model.values.times import SECOND_NS
from skep.store.interface import Created, Deleted, Updated, View

TOLERANCE = 0.99
"""Clocks of machines run at different rates."""
DEFAULT_DELAY_S = 5.0
STOPPING_S = 2.0
"""Time until a node is told to stop its containers and has stopped them, with a margin."""
NOTICED_S = 7.0
"""Time until a partitioned node notices it: one heartbeat period, and the longest timeout of a response."""
TWICE_S = 9.0
"""Time for which a slot may have two containers after the last fault.

By then a partitioned node has reconnected (retries of two seconds, a connection that takes five), received its
assignments and stopped its own container.
"""


class Record(msgspec.Struct):
    """The history of one task, kept after its deletion."""

    task: Task
    created_at: float
    retired_at: float | None = None
    """Time at which its desired state passed running."""
    failed_at: float | None = None
    """Time at which the store showed that it ended by itself."""
    leaves_drained: bool = False
    """Whether the slot's previous or running task was on a drained node when this task was created."""


class Containers:
    """Records the times of commits, and checks each start and stop of a container against them."""

    def __init__(
        self,
        working_since: Callable[[NodeId], float] = lambda _: inf,
        alone_since: Callable[[NodeId], float] = lambda _: inf,
        unreadable: Callable[[], Collection[NodeId]] = tuple,
    ) -> None:
        """Observe containers.

        Args:
            working_since: returns the start of a node's current uptime (process and machine), or infinity if it is
                down.
            alone_since: returns the time since which a node has reached no manager, or infinity if it reaches one.
            unreadable: returns the nodes whose values are damaged on some manager's disk.
        """
        self._unreadable = unreadable
        self._working_since = working_since
        self._alone_since = alone_since
        self.live: dict[TaskId, NodeId] = {}
        """Running containers, and their nodes."""
        self._records: dict[TaskId, Record] = {}
        self._slots: dict[str, list[TaskId]] = {}
        self._twice_since: dict[str, float] = {}
        """Time since which a slot has had more containers than allowed, or infinity once that was reported."""
        self._reported: set[TaskId] = set()
        """Tasks that were reported because they kept running after their node lost its managers."""
        self._down_at: dict[NodeId, float] = {}
        """Time at which a node was last not ready."""
        self._active_at: dict[NodeId, float] = {}
        """Time at which a node last became active, or was paused for a leader that cannot read it."""
        self._retried_at: dict[ServiceId, float] = {}
        """Time at which a user last retried a job."""

    def __call__(self, change: Change, view: View) -> Iterable[str]:
        """Record a commit.  No commit is a violation by itself."""
        for event in change.events:
            match event:
                case Created(Task() as task):
                    slot = self._slots.setdefault(_slot_of(task), [])
                    is_drained = any(
                        is_on_drained_node(self._records[id].task, view)
                        for id in slot
                        if id in self.live or id == slot[-1]
                    )
                    self._records[task.id] = Record(task, change.time_s, leaves_drained=is_drained)
                    slot.append(task.id)
                case Updated(Task() as old, Task() as new):
                    self._note(self._records[new.id], old, new, change.time_s)
                    if old.is_wanted and not new.is_wanted and new.node_id in self._unreadable():
                        self._active_at[new.node_id] = change.time_s
                case Updated(Service() as earlier, Service() as service) if is_retried(earlier, service):
                    self._retried_at[service.id] = change.time_s
                case Created(Node() as node) | Deleted(Node() as node):
                    self._down_at[node.id] = change.time_s
                case Updated(Node() as before, Node() as after):
                    if NodeState.DOWN in (before.status.state, after.status.state):
                        self._down_at[after.id] = change.time_s
                    if before.spec.availability != after.spec.availability:
                        self._active_at[after.id] = change.time_s
        return ()

    def started(self, node_id: NodeId, task: Task, now: float, view: View) -> Iterable[str]:
        """Check the start of a container: its predecessor has stopped, and the restart delay is over."""
        self.live[task.id] = node_id
        others = [
            self._records[id].task for id, at in self.live.items() if at == node_id and id in self._records
        ]
        yield from port_violations(node_id, task, others, view)
        yield from device_violations(node_id, task, others)
        yield from self._beside(task, now, view)
        yield from self._early(task, now)

    def stopped(self, node_id: NodeId, task_id: TaskId, view: View) -> Iterable[str]:
        """Check the stop of a running container: its task must not be desired on that node."""
        task = view.lookup(Task, task_id)
        if task is None or task.node_id != node_id or not task.is_wanted:
            return
        if view.lookup(Node, node_id) is not None and not _may_stop_alone(view, task):
            yield f"{node_id} stopped the container of task {task_id}, which is to run there"

    def lasting(self, now: float, calm_since: float, view: View) -> Iterable[str]:
        """Yield the slots that have had two containers for too long (three with start-first).  Call it at
        intervals.
        """
        counts = Counter(_slot_of(self._records[id].task) for id in self.live)
        crowded = sorted(slot for slot, count in counts.items() if count > _containers_max(slot, view))
        self._twice_since = {slot: self._twice_since.get(slot, now) for slot in crowded}
        for slot, since in self._twice_since.items():
            if (lasted_s := now - max(since, calm_since)) > TWICE_S:
                self._twice_since[slot] = inf
                yield f"slot {slot} has {counts[slot]} containers, {lasted_s:.1f} s after the last fault"

    def outlasting(self, now: float, view: View) -> Iterable[str]:
        """Yield the containers that a partitioned node should have stopped by itself.  Call it at intervals."""
        for task_id, node_id in sorted(self.live.items()):
            alone_s = now - max(self._alone_since(node_id), self._working_since(node_id))
            if alone_s < NOTICED_S or task_id in self._reported:
                continue
            task = self._records[task_id].task
            service = view.lookup(Service, task.service_id)
            policy = disconnect_policy(service.spec.labels) if service is not None else DisconnectPolicy()
            stopped_s = max(policy.delay_s, NOTICED_S) + task.spec.stop_grace_s + STOPPING_S
            if policy.action is OnDisconnect.STOP and alone_s > stopped_s:
                self._reported.add(task_id)
                yield f"task {task_id} still runs on {node_id}, disconnected for {alone_s:.1f} s with the policy stop"

    def ended(self, task_id: TaskId) -> None:
        """Record the end of a container, for whatever reason."""
        self.live.pop(task_id, None)

    # -- inside --------------------------------------------------------------------------------------------

    def _note(self, record: Record, old: Task, new: Task, now: float) -> None:
        record.task = new
        if old.is_wanted and not new.is_wanted:
            record.retired_at = now
        by_itself = (TaskState.COMPLETE, TaskState.FAILED, TaskState.REJECTED)
        if old.status.state != new.status.state and new.status.state in by_itself and old.is_wanted:
            record.failed_at = now
        if new.desired_state is TaskState.REMOVE:
            record.failed_at = (
                None  # its slot is removed, and a slot that a later scale-up creates has no restart delay
            )

    def _beside(self, task: Task, now: float, view: View) -> Iterable[str]:
        service = view.lookup(Service, task.service_id)
        own = self._records.get(task.id)
        # The replacement of a task on a drained node starts first, also if the node is active again by then.
        if service is None or own is None or own.leaves_drained or may_start_first(service):
            return
        slot = self._slots[_slot_of(own.task)]
        for id in slot[: slot.index(task.id)]:
            other, node_id = self._records[id], self.live.get(id)
            if node_id is None or other.retired_at is None:
                continue
            is_reported = other.task.status.state > TaskState.RUNNING
            node = view.lookup(Node, node_id)
            was_lost = self._down_at.get(node_id, -1.0) >= other.retired_at or is_lost(node)
            if was_lost and node is not None and self._must_have_stopped(other.task, own.task, now, service):
                yield f"task {task.id} started while {id}, which {node_id} was to stop by itself, still ran there"
            waits_s = stop_seconds_max(other.task, service.spec.labels)
            is_overdue = now - other.retired_at > waits_s * TOLERANCE
            if not is_reported and not was_lost and not is_overdue:
                yield f"task {task.id} started while {id}, which it replaces, still ran on {node_id}"

    def _must_have_stopped(self, other: Task, successor: Task, now: float, service: Service) -> bool:
        """Return whether the partitioned node of ``other`` had time to stop it before its successor started.

        A node that a user has removed counts as lost, whatever the policy.
        """
        policy = disconnect_policy(service.spec.labels)
        if policy.action is not OnDisconnect.STOP or other.spec != successor.spec:
            return False
        return (
            now - self._working_since(other.node_id) > policy.delay_s + other.spec.stop_grace_s + STOPPING_S
        )

    def _early(self, task: Task, now: float) -> Iterable[str]:
        """Yield a violation if a successor with the same spec starts before its restart delay is over.

        The delay does not hold for the successor of a task that failed on a drained node, or of a task of a job that a
        user has retried since.  Nor does it hold where a global service fills a node again that has become active, or
        was down, since the task failed: then the task was retired alone, not replaced.

        Source: swarmkit, manager/orchestrator/restart/restart.go (Restart) and manager/orchestrator/global/global.go
        (reconcileOneNode).
        """
        own = self._records.get(task.id)  # Use the committed task, because defaults are explicit on the wire.
        if own is None:
            return
        slot = self._slots[_slot_of(own.task)]
        place = slot.index(task.id)
        if not place:
            return
        before = self._records[slot[place - 1]]
        if (
            before.failed_at is None
            or before.failed_at > own.created_at
            or own.leaves_drained
            or before.failed_at <= self._retried_at.get(own.task.service_id, -inf) <= own.created_at
            or not _is_same(before.task, own.task)
        ):
            return
        node_id = own.task.node_id
        changed_at = max(self._active_at.get(node_id, -inf), self._down_at.get(node_id, -inf))
        if not own.task.slot and changed_at > before.failed_at and before.retired_at != own.created_at:
            return
        delay_s = _delay_s(before.task) * TOLERANCE
        if now < before.failed_at + delay_s:
            waited_s = now - before.failed_at
            yield f"task {task.id} started {waited_s:.2f} s after {before.task.id} failed, not {delay_s:.2f}"


def _containers_max(slot: str, view: View) -> int:
    """Return the number of containers that a slot may have permanently."""
    service = view.lookup(Service, slot.partition("/")[0])
    moves = any(one.relocation is not None for one in view.find(Task, slot=slot))
    return 2 if service is not None and (moves or may_start_first(service)) else 1


def _is_same(before: Task, successor: Task) -> bool:
    """Return whether both tasks have the same spec and job iteration."""
    return before.spec == successor.spec and before.job_iteration == successor.job_iteration


def _may_stop_alone(view: View, task: Task) -> bool:
    """Return whether its service's policy lets a node without managers stop the task."""
    service = view.lookup(Service, task.service_id)
    return service is not None and service.spec.labels.get(ON_DISCONNECT) == OnDisconnect.STOP.value


def _slot_of(task: Task) -> str:
    return f"{task.service_id}/{task.slot or task.node_id}"


def _delay_s(task: Task) -> float:
    policy = task.spec.restart_policy
    return DEFAULT_DELAY_S if policy is None or policy.delay is None else policy.delay / SECOND_NS
