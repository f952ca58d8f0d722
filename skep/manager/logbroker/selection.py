"""Which nodes and tasks a log query matches.

Source: swarmkit, manager/logbroker/subscription.go (match).
"""

import msgspec

from skep.model.ids import NodeId, TaskId
from skep.model.logs import LogQuery
from skep.model.task import Task
from skep.store.interface import View


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """Nodes with a matching task, and matching tasks without a node."""

    nodes: frozenset[NodeId] = frozenset()
    unscheduled: frozenset[TaskId] = frozenset()


def selected(view: View, query: LogQuery) -> Selection:
    """The present nodes and tasks of ``query``."""
    tasks: dict[TaskId, Task] = {}
    for service_id in query.services:
        tasks.update((task.id, task) for task in view.find(Task, service_id=service_id))
    for node_id in query.nodes:
        tasks.update((task.id, task) for task in view.find(Task, node_id=node_id))
    for task_id in query.tasks:
        task = view.lookup(Task, task_id)
        if task is not None:
            tasks[task.id] = task
    return Selection(
        nodes=frozenset(task.node_id for task in tasks.values() if task.node_id),
        unscheduled=frozenset(task.id for task in tasks.values() if not task.node_id),
    )


def matches(query: LogQuery, task: Task) -> bool:
    """Whether ``query`` matches this task."""
    return task.service_id in query.services or task.id in query.tasks or task.node_id in query.nodes


def shortfall(selection: Selection, reasons: list[str]) -> str:
    """What is missing from a stream of logs, in SwarmKit's words; empty: nothing."""
    missing = [
        *reasons,
        *(f"task {id} has not been scheduled" for id in sorted(selection.unscheduled)),
    ]
    if not missing:
        return ""
    return (
        "warning: incomplete log stream. some logs could not be retrieved for the following reasons: "
        + ", ".join(missing)
    )
