"""Rules on who writes: the leader's objects only by the leader, what a node says only by the owner of its session."""

from collections.abc import Iterable

from sim.committed import Change
from skep.model.node import Node, NodeState
from skep.model.task import Task, TaskState
from skep.store.interface import Updated, View
from skep.store.keys import HEAD, parsed_object_key


def one_leader_writes(change: Change, view: View) -> Iterable[str]:
    """A task's head is written by the leader alone, deletion included."""
    for written in change.keys:
        if written.key.startswith("o/task/") and change.origin != change.leader:
            _, id, part = parsed_object_key(written.key)
            if part == HEAD:
                yield f"{change.origin} wrote task {id}, while {change.leader} leads"


def owners_speak_for_their_nodes(change: Change, view: View) -> Iterable[str]:
    """What a node reports is written by the manager that has its session, and so is that it is down."""
    for event in change.events:
        match event:
            case Updated(Task() as old, Task() as new) if _is_report(old, new):
                node = view.lookup(Node, new.node_id)
                owner = node.session.manager_id if node is not None and node.session is not None else None
                if owner != change.origin:
                    yield f"{change.origin} wrote what {new.node_id} said of {new.id}; its session is {owner}'s"
            case Updated(Node() as before, Node() as after) if (
                after.status.state is NodeState.DOWN and before.status.state is not NodeState.DOWN
            ):
                owner = after.session.manager_id if after.session is not None else None
                if owner != change.origin:
                    yield f"{change.origin} judged {after.id}, whose session is {owner}'s"


def sessions_are_taken(change: Change, view: View) -> Iterable[str]:
    """A manager takes sessions for itself; none is given away or taken away."""
    for event in change.events:
        match event:
            case Updated(Node() as before, Node() as after) if before.session != after.session:
                owner = after.session.manager_id if after.session is not None else None
                if owner != change.origin:
                    yield f"{change.origin} made {owner} the owner of the session of {after.id}"


def _is_report(old: Task, new: Task) -> bool:
    """Whether the change is one that only the task's node can tell."""
    return (
        old.status != new.status
        and bool(old.node_id)
        and old.status.state >= TaskState.ASSIGNED
        and TaskState.ACCEPTED <= new.status.state <= TaskState.REJECTED
    )
