"""Nodes and tasks that a log query matches.

Source: swarmkit, manager/logbroker/subscription.go (match).
"""

from collections.abc import Collection, Iterator, Set

import msgspec
from msgspec.structs import replace

from skep.manager.cluster import node_name
from skep.model.logs import LogLine, LogQuery, LogStream
from skep.model.node import Node
from skep.model.service import Service
from skep.model.task import Task, state_age
from skep.model.values.ids import NodeId, TaskId
from skep.model.values.times import unix_ns
from skep.store.interface import View

KEPT = "skep-kept"
"""Attribute of lines that are stored with their task, because its node did not send them.

Its value is ``KEPT_HEAD`` for the sentence before these lines, which is not a line of the task.
"""
KEPT_HEAD = "head"

_STREAMS = {"stdout": LogStream.STDOUT, "stderr": LogStream.STDERR}


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """Nodes with a matching task, and matching tasks without a node."""

    nodes: frozenset[NodeId] = frozenset()
    unscheduled: frozenset[TaskId] = frozenset()


def selected(view: View, query: LogQuery) -> Selection:
    """Return the current nodes and tasks of ``query``."""
    tasks = _tasks(view, query)
    return Selection(
        nodes=frozenset(task.node_id for task in tasks if task.node_id),
        unscheduled=frozenset(task.id for task in tasks if not task.node_id),
    )


def kept_lines(view: View, query: LogQuery, nodes: Collection[NodeId]) -> Iterator[LogLine]:
    """Yield the lines stored with ended tasks of silent or removed ``nodes``, with a sentence before each
    task's lines.
    """
    for task in sorted(_tasks(view, query), key=state_age):
        end = task.status.end
        if end is None or task.node_id not in nodes:
            continue
        lines = [
            LogLine(
                task_id=task.id,
                service_id=task.service_id,
                node_id=task.node_id,
                stream=_STREAMS.get(line.stream, LogStream.STDOUT),
                timestamp_ns=unix_ns(line.timestamp),
                data=f"{line.text}\n".encode(),
                attrs={KEPT: "true"},
            )
            for line in end.lines
        ]
        wanted = [line for line in lines if _is_wanted(query, line)]
        if query.tail is not None:
            wanted = wanted[len(wanted) - min(query.tail, len(wanted)) :]
        if wanted:
            head = f"skep: {_absence(view, task.node_id)}; the last lines kept with the task:\n"
            yield replace(wanted[0], data=head.encode(), attrs={KEPT: KEPT_HEAD})
            yield from wanted


def absences(view: View, query: LogQuery, nodes: Set[NodeId], now_ns: int) -> Iterator[LogLine]:
    """Yield one line for each of ``nodes`` with a matching task, which explains why the node's lines are missing.

    The line appears as a line of the task.
    """
    stream = LogStream.STDERR if LogStream.STDERR in query.streams or not query.streams else query.streams[0]
    tasks = {
        task.node_id: task for task in sorted(_tasks(view, query), key=lambda task: (task.slot, task.id))
    }
    for node_id in sorted(nodes & tasks.keys()):
        yield LogLine(
            task_id=tasks[node_id].id,
            service_id=tasks[node_id].service_id,
            node_id=node_id,
            stream=stream,
            timestamp_ns=now_ns,
            data=f"skep: {_absence(view, node_id)}\n".encode(),
            attrs={KEPT: KEPT_HEAD},
        )


def _is_wanted(query: LogQuery, line: LogLine) -> bool:
    return line.timestamp_ns >= query.since_ns and (not query.streams or line.stream in query.streams)


def is_removed(view: View, node_id: NodeId) -> bool:
    """Return whether the node is no longer part of the cluster."""
    return view.lookup(Node, node_id) is None and node_id not in view.unreadable(Node)


def _absence(view: View, node_id: NodeId) -> str:
    """Return a sentence like ``node w1 does not answer`` or ``node w1 was removed``."""
    return (
        f"node {node_name(view, node_id)} {'was removed' if is_removed(view, node_id) else 'does not answer'}"
    )


def _task_name(view: View, id: TaskId) -> str:
    """Return a name like ``web.2``, with the node's name without a slot, or the id of a task without a service."""
    task = view.lookup(Task, id)
    service = view.lookup(Service, task.service_id) if task is not None else None
    if task is None or service is None or not (task.slot or task.node_id):
        return id
    return f"{service.spec.name}.{task.place(node_name(view, task.node_id))}"


def _tasks(view: View, query: LogQuery) -> Collection[Task]:
    tasks: dict[TaskId, Task] = {}
    for service_id in query.services:
        tasks.update((task.id, task) for task in view.find(Task, service_id=service_id))
    for node_id in query.nodes:
        tasks.update((task.id, task) for task in view.find(Task, node_id=node_id))
    for task_id in query.tasks:
        task = view.lookup(Task, task_id)
        if task is not None:
            tasks[task.id] = task
    return tasks.values()


def matches(query: LogQuery, task: Task) -> bool:
    """Return whether ``query`` matches this task."""
    return task.service_id in query.services or task.id in query.tasks or task.node_id in query.nodes


def _unscheduled(view: View, id: TaskId) -> str:
    task = view.lookup(Task, id)
    why = f" ({task.status.err})" if task is not None and task.status.err else ""
    return f"task {_task_name(view, id)} has not been scheduled{why}"


def shortfall(view: View, selection: Selection, reasons: list[str]) -> str:
    """Return why a stream of logs is incomplete, in SwarmKit's words but with names, or an empty text."""
    missing = [
        *reasons,
        *(_unscheduled(view, id) for id in sorted(selection.unscheduled)),
    ]
    if not missing:
        return ""
    return (
        "warning: incomplete log stream. some logs could not be retrieved for the following reasons: "
        + ", ".join(missing)
    )
