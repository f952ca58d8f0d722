"""Invariants of a cluster at rest: exactly the desired tasks run, and every replica equals the committed state."""

from collections.abc import Iterable

from skep.model.ids import NodeId, TaskId
from skep.model.task import Task, TaskState
from skep.store.interface import View
from skep.store.state import State, differences


def rest_violations(
    view: View, containers: Iterable[tuple[NodeId, Task]], kept: Iterable[tuple[NodeId, TaskId]] = ()
) -> Iterable[str]:
    """Every container belongs to a task that is to run where it is, and the other way round.

    Args:
        kept: tasks of which a node remembers anything; it forgets a task when the task's record is gone.
    """
    running = {task.id: node_id for node_id, task in containers}
    for id, node_id in running.items():
        task = view.lookup(Task, id)
        if task is None or not task.is_wanted or task.node_id != node_id:
            yield f"container of task {id} on {node_id} belongs to no task that is to run there"
    for task in view.find(Task):
        is_up = task.status.state is TaskState.RUNNING and task.is_wanted
        if is_up and task.id not in running:
            yield f"task {task.id} is said to run on {task.node_id} and does not"
    for node_id, task_id in kept:
        task = view.lookup(Task, task_id)
        if task is None or task.node_id != node_id:
            yield f"{node_id} keeps what is left of task {task_id}, which is not its own"


def replica_violations(manager: NodeId, replica: State, committed: State) -> Iterable[str]:
    """A replica that has come to the last revision shows exactly what is committed."""
    if replica.revision < committed.revision:
        yield f"the replica of {manager} is at {replica.revision} of {committed.revision}"
        return
    for event in differences(committed, replica):
        yield f"the replica of {manager} differs: {event}"
    if replica.claims.keys() != committed.claims.keys():
        yield f"the replica of {manager} knows other names: {replica.claims.keys() ^ committed.claims.keys()}"
