"""Rules on ``skep.on-disconnect``: when a task on a down node is replaced."""

from collections.abc import Iterable

from sim.invariants.nodes.placement import constraints_of, meets
from sim.world.committed import Change
from skep.model.node import Availability, Node, NodeState
from skep.model.options.labels import OnDisconnect, disconnect_policy
from skep.model.service import Service
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId, TaskId
from skep.store.interface import Created, Updated, View

TOLERANCE = 0.99
"""Clocks of machines run at different rates."""


class DisconnectPolicies:
    """A task on a down node is replaced according to its service's policy.

    With ``keep`` it is replaced on request only, with ``replace`` after the delay, and with ``stop`` once its node
    must have stopped it.
    """

    def __init__(self) -> None:
        self._down_at: dict[NodeId, float] = {}

    def __call__(self, change: Change, view: View) -> Iterable[str]:
        for event in change.events:
            match event:
                case Updated(Node() as before, Node() as after) if (
                    before.status.state is not NodeState.DOWN and after.status.state is NodeState.DOWN
                ):
                    self._down_at[after.id] = change.time_s
        made = {
            event.object.id
            for event in change.events
            if isinstance(event, Created) and isinstance(event.object, Task)
        }
        for event in change.events:
            match event:
                case Updated(Task() as old, Task() as new) if _is_replaced(old, new):
                    yield from self._violations(old, change.time_s, view, made)

    def _violations(self, task: Task, now: float, view: View, made: set[TaskId]) -> Iterable[str]:
        node, service = view.lookup(Node, task.node_id), view.lookup(Service, task.service_id)
        if node is None or service is None or _has_other_cause(task, service, node, view, made):
            return
        policy = disconnect_policy(service.spec.labels)
        down_s = now - self._down_at.get(node.id, 0.0)
        match policy.action:
            case OnDisconnect.KEEP:
                yield f"task {task.id} was replaced despite keep, {down_s:.2f} s after {node.id} went down"
                return
            case OnDisconnect.STOP:
                kept_s = policy.delay_s + task.spec.stop_grace_s
            case _:
                kept_s = policy.delay_s
        if down_s < kept_s * TOLERANCE:
            yield f"task {task.id} was replaced {down_s:.2f} s after {node.id} went down, not {kept_s:.2f}"


def _is_replaced(old: Task, new: Task) -> bool:
    return old.is_active and not new.is_wanted and new.desired_state < TaskState.REMOVE and bool(new.node_id)


def _has_other_cause(task: Task, service: Service, node: Node, view: View, made: set[TaskId]) -> bool:
    """Return whether the task is replaced for another reason than a down node."""
    slot = view.find(Task, slot=f"{task.service_id}/{task.slot or task.node_id}")
    return (
        node.status.state is not NodeState.DOWN
        or node.spec.availability is Availability.DRAIN
        or service.removed_at is not None
        or task.job_iteration is not None
        or task.spec != service.spec.task_template
        or not meets(constraints_of(service.spec), node)
        or any(other.is_wanted and other.id not in made for other in slot)
    )
