"""A rule on new tasks: none is created in a slot that already has a healthy task of the current spec."""

from collections.abc import Iterable

from sim.invariants.nodes.placement import reservations
from sim.invariants.services.tasks import has_placement
from sim.world.committed import Change
from skep.model.node import Availability, Node, NodeState
from skep.model.service import Resources, Service
from skep.model.task import Task
from skep.model.values.ids import NodeId
from skep.store.interface import Created, Updated, View

KNOWN_S = 3.0
"""A node change that is more recent than this may not have reached the leader."""


class NoRedundantTasks:
    """No task is created in a slot (of a job: in an iteration) that has a task of the current spec on a healthy node.

    Checked only if the new task has the current spec version, because then the leader's replica showed the current
    spec.
    """

    def __init__(self) -> None:
        self._changed_at: dict[NodeId, float] = {}

    def __call__(self, change: Change, view: View) -> Iterable[str]:
        for event in change.events:
            match event:
                case Created(Node() as node) | Updated(_, Node() as node) if _is_changed(event):
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
            return  # a task that no longer fits its node has to move
        for other in view.find(Task, slot=f"{task.service_id}/{task.slot or task.node_id}"):
            if (
                other.id != task.id
                and other.job_iteration == task.job_iteration
                and other.spec == task.spec
                and other.is_wanted
                and other.is_active
                and other.relocation is None
                and self._is_healthy(view.lookup(Node, other.node_id), now)
            ):
                yield f"task {task.id} was created beside {other.id}, which has the current spec and is healthy"

    def _is_healthy(self, node: Node | None, now: float) -> bool:
        return (
            node is not None
            and node.status.state is NodeState.READY
            and node.spec.availability is Availability.ACTIVE
            and now - self._changed_at.get(node.id, 0.0) > KNOWN_S
        )


def _is_changed(event: object) -> bool:
    match event:
        case Updated(Node() as before, Node() as after):
            return before.spec != after.spec or before.status.state is not after.status.state
        case _:
            return True
