"""A rule on full disks: a node that has said that its disk is full gets no new task until it says otherwise."""

from collections.abc import Iterable
from math import inf

from sim.committed import Change
from skep.model.conditions import DISK_PRESSURE_LABEL
from skep.model.ids import NodeId
from skep.model.node import Node
from skep.model.service import Service
from skep.model.slot_volumes import SLOT_VOLUMES_LABEL
from skep.model.task import Task
from skep.store.interface import Created, Deleted, Updated, View

KNOWN_S = 10.0
"""A leader's replica may not show the report of a node for so long: the deadline of a write."""


def has_full_disk(node: Node) -> bool:
    """Whether the node asks for no new tasks."""
    return DISK_PRESSURE_LABEL in node.description.engine.labels


class FullNodesGetNoNewTasks:
    """No task is assigned to a full node but one whose slot was there before: it replaces what the node had."""

    def __init__(self) -> None:
        self._full_since: dict[NodeId, float] = {}
        self._left: dict[tuple[str, NodeId], float] = {}
        """When the last task of a slot was deleted from a node.  The scheduler may have decided before it knew."""

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
    """The schema's index "slot"."""
    return f"{task.service_id}/{task.slot or task.node_id}"


def _is_assigned(old: Task, new: Task) -> bool:
    return old.status.state < new.status.state and new.status.message.startswith("scheduler ")


def _was_there(task: Task, view: View) -> bool:
    """Whether the slot had a task on the node, or has data in its volumes."""
    slot = view.find(Task, slot=_slot(task))
    if any(one.node_id == task.node_id for one in slot if one.id != task.id):
        return True
    service, node = view.lookup(Service, task.service_id), view.lookup(Node, task.node_id)
    mark = f"={service.spec.name}.{task.slot}@" if service is not None else ""
    volumes = node.description.engine.labels.get(SLOT_VOLUMES_LABEL, "") if node is not None else ""
    return bool(mark) and mark in volumes
