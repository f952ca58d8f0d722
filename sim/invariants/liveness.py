"""Rules on node status: no node is marked down without a fault, and no task is shown as running on a dead node."""

from collections.abc import Callable, Iterable

from sim.world.committed import Change
from skep.manager.control import tasks
from skep.model.node import Node, NodeState
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId
from skep.store.interface import Updated, View

CALM_S = 15.0
"""Longer than any grace period and any reconnection to another manager."""


YOUNG_S = 2.0
"""Shorter than any grace period.  A manager that has just started cannot have missed a node for longer."""


class NoFalseDown:
    """No running node is marked down after a calm period.  A manager that has just started marks no node down."""

    def __init__(
        self,
        calm_since: Callable[[], float],
        up_since: Callable[[NodeId], float],
        began: Callable[[NodeId], float],
    ) -> None:
        """Observe node statuses.

        Args:
            calm_since: returns the end of the last fault, or infinity while a fault is active.
            up_since: returns the start of a node's process, or infinity where none runs, as after a leave.
            began: returns the start of a manager's process.
        """
        self._calm_since = calm_since
        self._up_since = up_since
        self._began = began

    def __call__(self, change: Change, view: View) -> Iterable[str]:
        for event in change.events:
            match event:
                case Updated(Node() as before, Node() as after) if (
                    after.status.state is NodeState.DOWN and before.status.state is not NodeState.DOWN
                ):
                    calm_s = change.time_s - max(self._calm_since(), self._up_since(after.id))
                    if calm_s > CALM_S:
                        yield f"{after.id} was marked down after {calm_s:.1f} s without a fault"
                    if (age_s := change.time_s - self._began(change.origin)) < YOUNG_S:
                        yield f"{after.id} was marked down by {change.origin}, {age_s:.1f} s after its start"


def lease_violations(view: View, node_id: NodeId) -> Iterable[str]:
    """Yield tasks shown as running on a node whose lease has expired."""
    for task in view.find(Task, node_id=node_id):
        if tasks.known_status(view, task).state is TaskState.RUNNING:
            yield f"task {task.id} is shown as running on {node_id}, whose lease has expired"
