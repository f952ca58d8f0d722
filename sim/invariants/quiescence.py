"""Invariants of a cluster at rest: exactly the desired tasks run, and every replica equals the committed state."""

from collections.abc import Iterable, Sequence

from sim.invariants.objects import unbounded_objects
from skep.aio.time_slices import run_at_once
from skep.manager.verify.looks import StateLook
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId, TaskId
from skep.store.interface import View
from skep.store.state import State, differences


def rest_violations(
    view: View, containers: Iterable[tuple[NodeId, Task]], kept: Iterable[tuple[NodeId, TaskId]] = ()
) -> Iterable[str]:
    """Check a cluster at rest: the containers match the tasks that should run, and the number of objects is bounded.

    Args:
        kept: tasks whose state a node keeps.  The node drops it when the task's record is deleted.
    """
    running = {task.id: node_id for node_id, task in containers}
    for id, node_id in running.items():
        task = view.lookup(Task, id)
        if task is None or not task.is_wanted or task.node_id != node_id:
            yield f"container of task {id} on {node_id} belongs to no task that is to run there"
    for task in view.find(Task):
        is_up = task.status.state is TaskState.RUNNING and task.is_wanted
        if is_up and task.id not in running:
            yield f"task {task.id} is reported as running on {task.node_id} and does not run"
    yield from unbounded_objects(view)
    for node_id, task_id in kept:
        task = view.lookup(Task, task_id)
        if task is None or task.node_id != node_id:
            yield f"{node_id} keeps state of task {task_id}, which is not assigned to it"


def replica_violations(manager: NodeId, replica: State, committed: State) -> Iterable[str]:
    """Check that a replica at the last revision equals the committed state."""
    if replica.revision < committed.revision:
        yield f"the replica of {manager} is at {replica.revision} of {committed.revision}"
        return
    for event in differences(committed, replica):
        yield f"the replica of {manager} differs: {event}"
    if replica.claims.keys() != committed.claims.keys():
        yield f"the replica of {manager} has other names: {replica.claims.keys() ^ committed.claims.keys()}"


def live_violations(view: View) -> Sequence[str]:
    """Return what ``skep verify`` would find.  At rest, each of its rules holds.

    Records of removed objects may remain until the reaper's next attempt (``is_leftover``).
    """
    assert isinstance(view, State), "a simulated cluster has its whole state"
    look = StateLook(view.copied(), {})
    run_at_once(look.steps())
    return [f"verify finds {one.rule}: {one.text}" for one in look.found]


def is_leftover(violation: str) -> bool:
    """Return whether a live violation is a record that the reaper removes."""
    return violation.startswith("verify finds leftover:")
