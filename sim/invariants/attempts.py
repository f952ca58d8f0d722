"""A rule on attempts: a slot that has what is asked for gets nothing beside it."""

from collections.abc import Iterable

from sim.committed import Change
from sim.invariants.tasks import has_placement, reservations
from skep.model.ids import NodeId
from skep.model.node import Availability, Node, NodeState
from skep.model.service import Resources, Service
from skep.model.task import Task
from skep.store.interface import Created, Updated, View

KNOWN_S = 3.0
"""What has happened to a node for less long may be unknown to the leader."""


class OneAttempt:
    """Beside a task of the present spec, on a node that is well, no other is begun in its slot (of a job: iteration).

    Asked only where the leader knew the present spec: what it made says of which one it is.
    """

    def __init__(self) -> None:
        self._changed_at: dict[NodeId, float] = {}

    def __call__(self, change: Change, view: View) -> Iterable[str]:
        for event in change.events:
            match event:
                case Created(Node() as node) | Updated(_, Node() as node) if _is_another(event):
                    self._changed_at[node.id] = change.time_s
        for event in change.events:
            match event:
                case Created(Task() as task):
                    yield from self._violations(task, change.time_s, view)

    def _violations(self, task: Task, now: float, view: View) -> Iterable[str]:
        service = view.lookup(Service, task.service_id)
        if service is None or task.spec_version != service.spec_version:
            return
        if has_placement(task) or reservations(task) != Resources():
            return  # what no longer fits where it is has to leave
        for other in view.find(Task, slot=f"{task.service_id}/{task.slot or task.node_id}"):
            if (
                other.id != task.id
                and other.job_iteration == task.job_iteration
                and other.spec == task.spec
                and other.is_wanted
                and other.is_active
                and self._is_well(view.lookup(Node, other.node_id), now)
            ):
                yield f"task {task.id} was begun beside {other.id}, which is what is asked for and well"

    def _is_well(self, node: Node | None, now: float) -> bool:
        return (
            node is not None
            and node.status.state is NodeState.READY
            and node.spec.availability is Availability.ACTIVE
            and now - self._changed_at.get(node.id, 0.0) > KNOWN_S
        )


def _is_another(event: object) -> bool:
    match event:
        case Updated(Node() as before, Node() as after):
            return before.spec != after.spec or before.status.state is not after.status.state
        case _:
            return True
