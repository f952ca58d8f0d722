"""A rule on full disks: a node that has reported a full disk gets no new task until it reports otherwise."""

from collections.abc import Iterable
from math import inf

from sim.world.committed import Change
from skep.model.node import Node
from skep.model.node_reports.conditions import DISK_PRESSURE_LABEL
from skep.model.options.slot_volumes import SLOT_VOLUMES_LABEL
from skep.model.service import Service
from skep.model.task import Task
from skep.model.values.ids import NodeId
from skep.store.interface import Created, Deleted, Updated, View

KNOWN_S = 10.0
"""Time for which a leader's replica may not show a node's report: the deadline of a write."""


def has_full_disk(node: Node) -> bool:
    """Return whether the node requests no new tasks."""
    return DISK_PRESSURE_LABEL in node.description.engine.labels


class FullNodesGetNoNewTasks:
    """A full node gets only tasks of slots that it already had, to replace the tasks there."""

    def __init__(self) -> None:
        self._full_since: dict[NodeId, float] = {}
        self._left: dict[tuple[str, NodeId], float] = {}
        """Time at which the last task of a slot was deleted from a node, which the scheduler may not have known
        yet.
        """

    def __call__(self, change: Change, view: View) -> Iterable[str]:
        for event in change.events:
            match event:
                case Created(Node() as node) | Updated(_, Node() as node) if has_full_disk(node):
                    self._full_since.setdefault(node.id, change.time_s)
                case Created(Node() as node) | Updated(_, Node() as node) | Deleted(Node() as node):
                    self._full_since.pop(node.id, None)
                case Deleted(Task() as task) if task.node_id:
                    self._left[_slot(task), task.node_id] = change.time_s
                case Updated(Task() as old, Task() as new) if _is_assigned(old, new):
                    since = self._full_since.get(new.node_id, change.time_s)
                    if change.time_s - max(since, self._left_at(new)) > KNOWN_S and not _was_there(new, view):
                        yield f"task {new.id} is assigned to {new.node_id}, whose disk is full since {since:.1f} s"

    def _left_at(self, task: Task) -> float:
        return self._left.get((_slot(task), task.node_id), -inf)


def _slot(task: Task) -> str:
    """Return the task's key in the schema's index "slot"."""
    return f"{task.service_id}/{task.slot or task.node_id}"


def _is_assigned(old: Task, new: Task) -> bool:
    return old.status.state < new.status.state and new.status.message.startswith("scheduler ")


def _was_there(task: Task, view: View) -> bool:
    """Return whether the slot had a task on the node, or has data in its volumes."""
    slot = view.find(Task, slot=_slot(task))
    if any(one.node_id == task.node_id for one in slot if one.id != task.id):
        return True
    service, node = view.lookup(Service, task.service_id), view.lookup(Node, task.node_id)
    mark = f"={service.spec.name}.{task.slot}@" if service is not None else ""
    volumes = node.description.engine.labels.get(SLOT_VOLUMES_LABEL, "") if node is not None else ""
    return bool(mark) and mark in volumes
