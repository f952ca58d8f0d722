"""Rules on what is said of nodes: none is down while nothing is wrong; of one that is, nothing is said to run."""

from collections.abc import Callable, Iterable

from sim.committed import Change
from skep.manager.control import tasks
from skep.model.ids import NodeId
from skep.model.node import Node, NodeState
from skep.model.task import Task, TaskState
from skep.store.interface import Updated, View

CALM_S = 15.0
"""Longer than any grace, and than finding another manager."""


YOUNG_S = 2.0
"""Less than any grace: a manager that has just begun cannot have missed a node for so long."""


class NoFalseAlarm:
    """While nothing was wrong anywhere for a while, nobody is down; who has just begun gives nodes time to come."""

    def __init__(self, calm_since: Callable[[], float], began: Callable[[NodeId], float]) -> None:
        """
        Args:
            calm_since: when the last fault was over; infinity while there is one.
            began: when a manager's process did.
        """
        self._calm_since = calm_since
        self._began = began

    def __call__(self, change: Change, view: View) -> Iterable[str]:
        for event in change.events:
            match event:
                case Updated(Node() as before, Node() as after) if (
                    after.status.state is NodeState.DOWN and before.status.state is not NodeState.DOWN
                ):
                    calm_s = change.time_s - self._calm_since()
                    if calm_s > CALM_S:
                        yield f"{after.id} was called down after {calm_s:.1f} s without a fault"
                    if (age_s := change.time_s - self._began(change.origin)) < YOUNG_S:
                        yield f"{after.id} was called down by {change.origin}, {age_s:.1f} s after that began"


def lease_violations(view: View, node_id: NodeId) -> Iterable[str]:
    """Of a node whose lease is over nothing is shown as running."""
    for task in view.find(Task, node_id=node_id):
        if tasks.known_status(view, task).state is TaskState.RUNNING:
            yield f"task {task.id} is shown as running on {node_id}, which nobody hears"
