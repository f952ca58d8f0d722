"""Rules on needless changes: a fault does not cause more tasks than it ended, and no decision is reversed without a
cause.
"""

from collections import Counter
from collections.abc import Iterable, Mapping

from sim.world.committed import Change
from skep.model.node import Availability, Node, NodeState
from skep.model.service import Service
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId, ServiceId, TaskId
from skep.store.interface import Created, Deleted, Updated, View

KNOWN_S = 5.0
"""A cause up to this long before a decision also counts, because the leader's replica may not have shown it yet."""


def surplus_violations(
    fault: str, lost: Mapping[ServiceId, int], before: Counter[ServiceId], after: Counter[ServiceId]
) -> Iterable[str]:
    """Check that one fault under steady load does not create more tasks than it ended.

    Args:
        lost: number of running tasks that the fault ended, or that were preempted for those, by steady service.  Other
            services are not checked.
        before: number of tasks ever created before the fault, by service.
        after: number of tasks ever created after it, by service.
    """
    for id, taken in lost.items():
        if (begun := after[id] - before[id]) > taken:
            yield f"{begun} tasks of {id} were created, though {fault} ended {taken}"


class DecisionsAreStable:
    """The leader does not reverse its own decisions on scale, restart and placement without a cause.

    Causes are a new spec of the service (by a user or a rollback), a change of the task's node or of the node
    that it was to relieve, the end of the task, its preemption, its move to another node (a drain or a rebalance), or
    for a job the completion of another task of the same run.  A node that cannot take tasks, and a newer run of the
    job, are causes however long ago they changed: a decision that was proposed before may be committed much later if a
    disk hung meanwhile.  For the same reason a new spec counts from the creation of the task on, although the task was
    assigned later.

    The product retires a task for no other reason, so a decision stands without limit.  Autoscaling changes the spec
    (``AutoscalingIsCalm``).
    """

    def __init__(self) -> None:
        self._changed_spec_at: dict[ServiceId, float] = {}
        """Time at which the spec of a service last changed."""
        self._changed_spec_in: dict[ServiceId, int] = {}
        """Revision of that change."""
        self._changed_at: dict[NodeId, float] = {}
        self._created_at: dict[TaskId, float] = {}
        self._decided_at: dict[TaskId, float] = {}
        """Time at which a task was created or assigned."""
        self._released: dict[tuple[str, int], tuple[int, float]] = {}
        """Slots (of a job: of an iteration) that were scaled away, with revision and time."""

    def __call__(self, change: Change, view: View) -> Iterable[str]:
        for event in change.events:
            self._note_cause(event, change)
        for event in change.events:
            match event:
                case Created(Task() as task):
                    self._created_at[task.id] = self._decided_at[task.id] = change.time_s
                    yield from self._filled_again(task)
                case Updated(Task() as old, Task() as new):
                    if old.desired_state < TaskState.REMOVE <= new.desired_state:
                        self._released[_slot_key(new)] = change.revision, change.time_s
                    if old.is_active and not new.is_wanted:
                        yield from self._taken_back(old, change.time_s, view)
                    if not old.node_id and new.node_id:
                        self._decided_at[new.id] = change.time_s
                case Deleted(Task() as task):
                    self._created_at.pop(task.id, None)
                    self._decided_at.pop(task.id, None)

    def _note_cause(self, event: object, change: Change) -> None:
        match event:
            case Created(Service() as service) | Deleted(Service() as service):
                self._note_spec_change(service.id, change)
            case Updated(Service() as old, Service() as new) if _spec_changed(old, new):
                self._note_spec_change(new.id, change)
            case Created(Node() as node) | Deleted(Node() as node):
                self._changed_at[node.id] = change.time_s
            case Updated(Node() as before, Node() as after) if _node_changed(before, after):
                self._changed_at[after.id] = change.time_s

    def _note_spec_change(self, id: ServiceId, change: Change) -> None:
        self._changed_spec_at[id], self._changed_spec_in[id] = change.time_s, change.revision

    def _filled_again(self, task: Task) -> Iterable[str]:
        """Yield a violation if a task is created in a slot that was scaled away, without a new spec since."""
        released = self._released.pop(_slot_key(task), None)
        if released is None:
            return
        revision, at = released
        spec_changed_at = self._changed_spec_at.get(task.service_id, 0.0)
        if self._changed_spec_in.get(task.service_id, 0) < revision and spec_changed_at < at - KNOWN_S:
            yield f"slot {task.slot or task.node_id} of {task.service_id} is filled again, though it was scaled away"

    def _taken_back(self, task: Task, now: float, view: View) -> Iterable[str]:
        service = view.lookup(Service, task.service_id)
        if service is None or service.removed_at is not None:
            return
        if task.spec != service.spec.task_template or task.preemption is not None:
            return  # replaced by an update, or stopped for another task
        if task.relocation is not None:
            return  # its successor runs on another node
        if service.job_status is not None and task.job_iteration != service.job_status.job_iteration:
            return  # a newer run has overtaken it
        if task.job_iteration is not None and _is_completed(
            _slot_key(task), view.find(Task, service_id=service.id)
        ):
            return  # its run is completed
        if task.node_id and not _takes_tasks(view.lookup(Node, task.node_id)):
            return
        if self._was_for_a_drain(task, view):
            return
        decided_at = self._decided_at[task.id]
        spec_changed_at = self._changed_spec_at.get(task.service_id, 0.0)
        node_changed_at = self._changed_at.get(task.node_id, 0.0)
        has_cause = (
            spec_changed_at >= self._created_at[task.id] - KNOWN_S or node_changed_at >= decided_at - KNOWN_S
        )
        if not has_cause:
            yield (
                f"task {task.id} of {task.service_id} is retired {now - decided_at:.1f} s after it was created or "
                f"assigned, without a cause"
            )

    def _was_for_a_drain(self, task: Task, view: View) -> bool:
        """Return whether the node of an older task of the slot, such as a drain that was undone, has changed since."""
        created_at = self._created_at[task.id]
        return any(
            one.is_wanted
            and one.id != task.id
            and self._created_at.get(one.id, 0.0) <= created_at
            and self._changed_at.get(one.node_id, 0.0) >= created_at - KNOWN_S
            for one in view.find(Task, slot=f"{task.service_id}/{task.slot or task.node_id}")
        )


def _spec_changed(old: Service, new: Service) -> bool:
    return old.spec != new.spec or old.removed_at != new.removed_at or old.job_status != new.job_status


def _node_changed(before: Node, after: Node) -> bool:
    return (
        before.spec != after.spec
        or before.description != after.description
        or before.status.state is not after.status.state
    )


def _takes_tasks(node: Node | None) -> bool:
    return (
        node is not None
        and node.status.state is NodeState.READY
        and node.spec.availability is Availability.ACTIVE
    )


def _is_completed(key: tuple[str, int], tasks: Iterable[Task]) -> bool:
    return any(_slot_key(one) == key and one.status.state is TaskState.COMPLETE for one in tasks)


def _slot_key(task: Task) -> tuple[str, int]:
    iteration = task.job_iteration.index if task.job_iteration is not None else 0
    return f"{task.service_id}/{task.slot or task.node_id}", iteration
