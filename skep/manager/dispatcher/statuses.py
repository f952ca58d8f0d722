"""Which of two statuses of a task counts.

States only move forward: whatever a node says late, twice or out of order, the furthest state stands.

Source: swarmkit, manager/dispatcher/dispatcher.go (processUpdates).
"""

import msgspec

from skep.errors import PermissionDenied
from skep.manager.dispatcher.registration import require_session
from skep.model.ids import NodeId, SessionId, TaskId
from skep.model.task import Task, TaskState, TaskStatus
from skep.store.interface import Transaction


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What the node says of one task, in the session it says it in."""

    node_id: NodeId
    session_id: SessionId
    task_id: TaskId
    status: TaskStatus


def newer_status(stored: TaskStatus, reported: TaskStatus) -> TaskStatus | None:
    """The status to store, or None to keep what is stored.

    A node can report ACCEPTED to REJECTED; what lies before is the leader's, what lies behind the cluster's.
    """
    if not TaskState.ACCEPTED <= reported.state <= TaskState.REJECTED:
        return None
    if reported.state < stored.state or reported == stored:
        return None
    if reported.state == stored.state and stored.state.is_terminal:
        return None  # an end is told once; what follows is the same end told again
    return reported


def record_status(tx: Transaction, report: Report) -> bool:
    """Write a status if it is news; gives whether it was.

    A task that is gone is passed over in silence: the node will be told to remove it.

    Raises:
        PermissionDenied: another node's task.
        SessionInvalid: another manager, or a later session, speaks for the node now.
    """
    require_session(tx, report.node_id, report.session_id)
    task = tx.lookup(Task, report.task_id)
    if task is None:
        return False
    if task.node_id != report.node_id:
        raise PermissionDenied(f"cannot update a task not assigned this node: {report.task_id}")
    tx.rely_on(Task, report.task_id, "status")
    status = newer_status(task.status, report.status)
    if status is None:
        return False
    tx.put(msgspec.structs.replace(task, status=status))
    return True
