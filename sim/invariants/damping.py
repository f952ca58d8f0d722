"""Rules on how little moves: no more is begun than a fault took, and no decision is taken back without a cause."""

from collections import Counter
from collections.abc import Iterable, Mapping

from sim.committed import Change
from skep.model.ids import NodeId, ServiceId, TaskId
from skep.model.node import Node
from skep.model.service import Service
from skep.model.task import Task, TaskState
from skep.store.interface import Created, Deleted, Updated, View

KNOWN_S = 5.0
"""A cause so long before a decision counts, too: the leader may have decided before it heard of it."""


def surplus_violations(
    fault: str, lost: Mapping[ServiceId, int], before: Counter[ServiceId], after: Counter[ServiceId]
) -> Iterable[str]:
    """After one fault under steady load no more is begun than was lost.

    Args:
        lost: running tasks of each steady service that the fault took; other services are not asked about.
        before, after: how many of each service were begun in all.
    """
    for id, taken in lost.items():
        if (begun := after[id] - before[id]) > taken:
            yield f"{begun} of {id} were begun, though {fault} took {taken}"


class DecisionsStand:
    """What the leader decided, scale, restart or placement, it does not take back by itself.

    Causes are: its service is asked for otherwise (by its user, or a rollback), the task's node changes, the task has
    ended, or of a job another task of its run has completed.

    Nothing in the product moves a task for any other reason yet, so the cool-down has no end here; what will
    (rebalancing, autoscaling) brings one.
    """

    def __init__(self) -> None:
        self._asked_at: dict[ServiceId, float] = {}
        """When a service was last asked for otherwise."""
        self._asked_in: dict[ServiceId, int] = {}
        """In which revision that was."""
        self._changed_at: dict[NodeId, float] = {}
        self._decided_at: dict[TaskId, float] = {}
        """When a task was made, or got its node."""
        self._given_up: dict[tuple[str, int], tuple[int, float]] = {}
        """Slots (of a job: of an iteration) that were scaled away, in which revision and when."""

    def __call__(self, change: Change, view: View) -> Iterable[str]:
        for event in change.events:
            self._note_cause(event, change)
        for event in change.events:
            match event:
                case Created(Task() as task):
                    self._decided_at[task.id] = change.time_s
                    yield from self._filled_again(task)
                case Updated(Task() as old, Task() as new):
                    if old.desired_state < TaskState.REMOVE <= new.desired_state:
                        self._given_up[_place_of(new)] = change.revision, change.time_s
                    if old.is_active and not new.is_wanted:
                        yield from self._taken_back(old, change.time_s, view)
                    if not old.node_id and new.node_id:
                        self._decided_at[new.id] = change.time_s
                case Deleted(Task() as task):
                    self._decided_at.pop(task.id, None)

    def _note_cause(self, event: object, change: Change) -> None:
        match event:
            case Created(Service() as service) | Deleted(Service() as service):
                self._asked(service.id, change)
            case Updated(Service() as old, Service() as new) if _is_asked_otherwise(old, new):
                self._asked(new.id, change)
            case Created(Node() as node) | Deleted(Node() as node):
                self._changed_at[node.id] = change.time_s
            case Updated(Node() as before, Node() as after) if _is_another(before, after):
                self._changed_at[after.id] = change.time_s

    def _asked(self, id: ServiceId, change: Change) -> None:
        self._asked_at[id], self._asked_in[id] = change.time_s, change.revision

    def _filled_again(self, task: Task) -> Iterable[str]:
        """Whether a slot is filled that was scaled away, and nobody has asked for more since."""
        given_up = self._given_up.pop(_place_of(task), None)
        if given_up is None:
            return
        revision, at = given_up
        asked_at = self._asked_at.get(task.service_id, 0.0)
        if self._asked_in.get(task.service_id, 0) < revision and asked_at < at - KNOWN_S:
            yield f"slot {task.slot or task.node_id} of {task.service_id} is filled again, though it was given up"

    def _taken_back(self, task: Task, now: float, view: View) -> Iterable[str]:
        service = view.lookup(Service, task.service_id)
        if service is None or service.removed_at is not None:
            return
        if task.spec != service.spec.task_template:
            return  # an update has come to it
        if task.job_iteration is not None and _is_completed(
            _place_of(task), view.find(Task, service_id=service.id)
        ):
            return  # the run that it stands for has completed after all
        decided_at = self._decided_at[task.id]
        caused_at = max(self._asked_at.get(task.service_id, 0.0), self._changed_at.get(task.node_id, 0.0))
        if caused_at < decided_at - KNOWN_S:
            yield (
                f"task {task.id} of {task.service_id} is taken back {now - decided_at:.1f} s after it was decided, "
                f"and nothing has happened since"
            )


def _is_asked_otherwise(old: Service, new: Service) -> bool:
    return old.spec != new.spec or old.removed_at != new.removed_at or old.job_status != new.job_status


def _is_another(before: Node, after: Node) -> bool:
    return (
        before.spec != after.spec
        or before.description != after.description
        or before.status.state is not after.status.state
    )


def _is_completed(place: tuple[str, int], tasks: Iterable[Task]) -> bool:
    return any(_place_of(one) == place and one.status.state is TaskState.COMPLETE for one in tasks)


def _place_of(task: Task) -> tuple[str, int]:
    iteration = task.job_iteration.index if task.job_iteration is not None else 0
    return f"{task.service_id}/{task.slot or task.node_id}", iteration
