"""Rules on what machines do: asked whenever a container starts or is stopped."""

from collections import Counter
from collections.abc import Callable, Iterable
from math import inf

import msgspec

from sim.committed import Change
from sim.invariants.placement import port_violations
from sim.invariants.tasks import may_start_first
from skep.model.ids import NodeId, TaskId
from skep.model.labels import ON_DISCONNECT, DisconnectPolicy, OnDisconnect, disconnect_policy
from skep.model.node import Node, NodeState
from skep.model.service import Service
from skep.model.task import Task, TaskState
from skep.model.times import SECOND_NS
from skep.store.interface import Created, Deleted, Updated, View

STOP_TIMEOUT_S = 60.0
"""A successor waits no longer than this for what it replaces; see ``orchestrator/restart.py``."""
TOLERANCE = 0.99
"""Clocks of machines run differently fast."""
DEFAULT_DELAY_S = 5.0
STOPPING_S = 2.0
"""Until a node sees that its containers are to be stopped, and has stopped them; and room."""
NOTICED_S = 7.0
"""Until a node that is cut off knows it: a heartbeat's period, and the longest that it waits for an answer."""
TWICE_S = 9.0
"""How long a slot may have two containers once nothing is wrong any more: until a node that was cut off is back
(retries of two seconds, a connection that takes five), hears of it, and has stopped its own."""


class Record(msgspec.Struct):
    """What is known of one task, also when it is history."""

    task: Task
    created_at: float
    retired_at: float | None = None
    """When it was no longer meant to run."""
    failed_at: float | None = None
    """When it was seen to have ended by itself."""


class Containers:
    """Remembers what was committed when, and judges each start and each stop by it."""

    def __init__(
        self,
        working_since: Callable[[NodeId], float] = lambda _: inf,
        alone_since: Callable[[NodeId], float] = lambda _: inf,
    ) -> None:
        """
        Args:
            working_since: since when a node's process and its machine run; infinity: they do not.
            alone_since: since when it reaches no manager; infinity: it does.
        """
        self._working_since = working_since
        self._alone_since = alone_since
        self.live: dict[TaskId, NodeId] = {}
        """Containers that run, and where."""
        self._records: dict[TaskId, Record] = {}
        self._slots: dict[str, list[TaskId]] = {}
        self._twice_since: dict[str, float] = {}
        """Since when a slot has more containers than it may have; infinity: that was told."""
        self._told: set[TaskId] = set()
        """What was told to outlast its node's contact with managers."""
        self._down_at: dict[NodeId, float] = {}
        """When a node was last known not to be ready."""

    def __call__(self, change: Change, view: View) -> Iterable[str]:
        """Remember; no commit is wrong by itself."""
        for event in change.events:
            match event:
                case Created(Task() as task):
                    self._records[task.id] = Record(task, change.time_s)
                    self._slots.setdefault(_slot_of(task), []).append(task.id)
                case Updated(Task() as old, Task() as new):
                    self._note(self._records[new.id], old, new, change.time_s)
                case Created(Node() as node) | Deleted(Node() as node):
                    self._down_at[node.id] = change.time_s
                case Updated(Node() as before, Node() as after):
                    if NodeState.DOWN in (before.status.state, after.status.state):
                        self._down_at[after.id] = change.time_s
        return ()

    def started(self, node_id: NodeId, task: Task, now: float, view: View) -> Iterable[str]:
        """A container starts: not beside one that is to make room for it, and not before the restart delay."""
        self.live[task.id] = node_id
        others = [
            self._records[id].task for id, at in self.live.items() if at == node_id and id in self._records
        ]
        yield from port_violations(node_id, task, others, view)
        yield from self._beside(task, now, view)
        yield from self._early(task, now)

    def stopped(self, node_id: NodeId, task_id: TaskId, view: View) -> Iterable[str]:
        """A node stops a container that runs: only what is no longer meant to run there."""
        task = view.lookup(Task, task_id)
        if task is None or task.node_id != node_id or not task.is_wanted:
            return
        if view.lookup(Node, node_id) is not None and not _may_stop_alone(view, task):
            yield f"{node_id} stopped the container of task {task_id}, which is to run there"

    def lasting(self, now: float, calm_since: float, view: View) -> Iterable[str]:
        """No slot has two containers for long (three, where an update starts first); to be asked now and then."""
        counts = Counter(_slot_of(self._records[id].task) for id in self.live)
        crowded = sorted(slot for slot, count in counts.items() if count > _room(slot, view))
        self._twice_since = {slot: self._twice_since.get(slot, now) for slot in crowded}
        for slot, since in self._twice_since.items():
            if (lasted_s := now - max(since, calm_since)) > TWICE_S:
                self._twice_since[slot] = inf
                yield f"slot {slot} has {counts[slot]} containers, {lasted_s:.1f} s after the last fault"

    def outlasting(self, now: float, view: View) -> Iterable[str]:
        """A node that reaches no manager has stopped by itself what is to be stopped then; to be asked now and then."""
        for task_id, node_id in sorted(self.live.items()):
            alone_s = now - max(self._alone_since(node_id), self._working_since(node_id))
            if alone_s < NOTICED_S or task_id in self._told:
                continue
            task = self._records[task_id].task
            service = view.lookup(Service, task.service_id)
            policy = disconnect_policy(service.spec.labels) if service is not None else DisconnectPolicy()
            stopped_s = max(policy.delay_s, NOTICED_S) + task.spec.stop_grace_s + STOPPING_S
            if policy.action is OnDisconnect.STOP and alone_s > stopped_s:
                self._told.add(task_id)
                yield f"task {task_id} still runs on {node_id}, which was to stop it and is cut off for {alone_s:.1f} s"

    def ended(self, task_id: TaskId) -> None:
        """A container is gone, however that came."""
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
            record.failed_at = None  # its slot has gone; one that comes back with a scale has no past

    def _beside(self, task: Task, now: float, view: View) -> Iterable[str]:
        service = view.lookup(Service, task.service_id)
        own = self._records.get(task.id)
        if service is None or own is None or may_start_first(service):
            return
        slot = self._slots[_slot_of(own.task)]
        for id in slot[: slot.index(task.id)]:
            other, node_id = self._records[id], self.live.get(id)
            if (
                node_id is None
                or other.retired_at is None
                or other.task.job_iteration != own.task.job_iteration
            ):
                continue
            is_reported = other.task.status.state > TaskState.RUNNING
            was_lost = self._down_at.get(node_id, -1.0) >= other.retired_at or _is_down(view, node_id)
            if was_lost and self._must_have_stopped(other.task, own.task, now, service):
                yield f"task {task.id} started while {id}, which {node_id} was to stop by itself, still ran there"
            is_overdue = now - own.created_at > STOP_TIMEOUT_S * TOLERANCE
            if not is_reported and not was_lost and not is_overdue:
                yield f"task {task.id} started while {id}, which it replaces, still ran on {node_id}"

    def _must_have_stopped(self, other: Task, heir: Task, now: float, service: Service) -> bool:
        """Whether the node of ``other`` had the time to stop it for lack of a manager, before its heir came."""
        policy = disconnect_policy(service.spec.labels)
        if policy.action is not OnDisconnect.STOP or other.spec != heir.spec:
            return False
        return (
            now - self._working_since(other.node_id) > policy.delay_s + other.spec.stop_grace_s + STOPPING_S
        )

    def _early(self, task: Task, now: float) -> Iterable[str]:
        own = self._records.get(
            task.id
        )  # as it was written: over the wire defaults are spelled out, slots otherwise
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
            or not _is_same(before.task, own.task)
        ):
            return
        delay_s = _delay_s(before.task) * TOLERANCE
        if now < before.failed_at + delay_s:
            waited_s = now - before.failed_at
            yield f"task {task.id} started {waited_s:.2f} s after {before.task.id} failed, not {delay_s:.2f}"


def _room(slot: str, view: View) -> int:
    """How many containers a slot may have for long."""
    service = view.lookup(Service, slot.partition("/")[0])
    return 2 if service is not None and may_start_first(service) else 1


def _is_same(before: Task, heir: Task) -> bool:
    """Whether one task follows the other without anybody having asked for something else."""
    return before.spec == heir.spec and before.job_iteration == heir.job_iteration


def _is_down(view: View, node_id: NodeId) -> bool:
    node = view.lookup(Node, node_id)
    return node is None or node.status.state is NodeState.DOWN


def _may_stop_alone(view: View, task: Task) -> bool:
    """Whether its service wants a node that lost all managers to stop it."""
    service = view.lookup(Service, task.service_id)
    return service is not None and service.spec.labels.get(ON_DISCONNECT) == OnDisconnect.STOP.value


def _slot_of(task: Task) -> str:
    return f"{task.service_id}/{task.slot or task.node_id}"


def _delay_s(task: Task) -> float:
    policy = task.spec.restart_policy
    return DEFAULT_DELAY_S if policy is None or policy.delay is None else policy.delay / SECOND_NS
