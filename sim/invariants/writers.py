"""Rules on writers of task heads, of node reports, and of cluster volumes."""

from collections.abc import Container, Iterable

from sim.world.committed import Change
from skep.manager.verify.tasks import shared_volume, volumes_of
from skep.model.node import Node, NodeState
from skep.model.task import Task, TaskState
from skep.model.values.ids import NodeId, TaskId
from skep.model.volume import Volume
from skep.store.interface import Updated, View
from skep.store.keys import HEAD, parsed_object_key


def one_leader_writes(change: Change, view: View) -> Iterable[str]:
    """Check that only the leader writes or deletes the head of a task."""
    for written in change.keys:
        if written.key.startswith("o/task/") and change.origin != change.leader:
            _, id, part = parsed_object_key(written.key)
            if part == HEAD:
                yield f"{change.origin} wrote task {id}, while {change.leader} leads"


def session_owners_report(change: Change, view: View) -> Iterable[str]:
    """Check that only the manager with a node's session writes the node's reports and marks it down."""
    for event in change.events:
        match event:
            case Updated(Task() as old, Task() as new) if _is_report(old, new):
                node = view.lookup(Node, new.node_id)
                owner = node.session.manager_id if node is not None and node.session is not None else None
                if owner != change.origin:
                    yield f"{change.origin} wrote a report of {new.node_id} on {new.id}; {owner} has its session"
            case Updated(Node() as before, Node() as after) if (
                after.status.state is NodeState.DOWN and before.status.state is not NodeState.DOWN
            ):
                owner = after.session.manager_id if after.session is not None else None
                if owner != change.origin:
                    yield f"{change.origin} marked {after.id} down; {owner} has its session"


def sessions_are_claimed(change: Change, view: View) -> Iterable[str]:
    """Check that a manager writes only itself as the owner of a session."""
    for event in change.events:
        match event:
            case Updated(Node() as before, Node() as after) if before.session != after.session:
                owner = after.session.manager_id if after.session is not None else None
                if owner != change.origin:
                    yield f"{change.origin} made {owner} the owner of the session of {after.id}"


def _is_report(old: Task, new: Task) -> bool:
    """Return whether the change is a report of the task's node."""
    return (
        old.status != new.status
        and bool(old.node_id)
        and old.status.state >= TaskState.ASSIGNED
        and TaskState.ACCEPTED <= new.status.state <= TaskState.REJECTED
    )


class SingleWriters:
    """Running tasks use a cluster volume only as its access mode allows.

    Tasks on the machines count, not the records, because a machine that no manager reaches still writes.
    """

    def __init__(self) -> None:
        self._running: dict[TaskId, tuple[NodeId, Task]] = {}
        self.given_up: Container[NodeId] = ()
        """Nodes that operators removed, which declares that they have no writers."""

    def started(self, node_id: NodeId, task: Task, view: View) -> Iterable[str]:
        """Record that a container was started, and check its volumes."""
        self._running[task.id] = node_id, task
        for id in volumes_of(task):
            volume = view.lookup(Volume, id)
            for other_id, other in self._running.values() if volume is not None else ():
                if other.id == task.id or other_id in self.given_up or id not in volumes_of(other):
                    continue
                assert volume is not None
                found = shared_volume(volume, (node_id, task), (other_id, other))
                yield from (one.text for one in found)

    def ended(self, task_id: TaskId) -> None:
        """Record that a container has ended."""
        self._running.pop(task_id, None)
