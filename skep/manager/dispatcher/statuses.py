"""Which of two task statuses is kept.

States only move forward: whatever a node reports late, twice or out of order, the furthest state is kept.

Source: swarmkit, manager/dispatcher/dispatcher.go (processUpdates).
"""

import msgspec
from msgspec.structs import replace

from skep.errors import PermissionDenied
from skep.manager.diagnosis.volume_reasons import unpublished
from skep.manager.dispatcher.node_sessions.registration import require_session
from skep.model.task import PortStatus, Task, TaskState, TaskStatus
from skep.model.task_end import LAST_LINES_MAX, bounded_end, cut
from skep.model.values.encoding import to_json
from skep.model.values.ids import NodeId, SessionId, TaskId, VolumeId
from skep.model.volume import NOT_PUBLISHED, PublishState, Volume
from skep.store.interface import Transaction

STATUS_BYTES_MAX = 16 * 1024
"""Maximum bytes of an encoded status, which the store keeps for every task."""
MESSAGE_BYTES_MAX = 1024
"""Bytes of a status's message that are stored.  Each task has one."""
ERR_BYTES_MAX = 2048
"""Bytes of a status's error that are stored."""
CONTAINER_ID_BYTES_MAX = 128
"""Twice the length of Docker's ids."""


def bounded(status: TaskStatus, lines_max: int = LAST_LINES_MAX) -> TaskStatus:
    """Return ``status`` within the limits: long texts are cut, then port names dropped, then the last ports.

    Args:
        lines_max: Lines of output that the cluster keeps with an ended task.
    """
    if status.end is not None:
        status = replace(status, end=bounded_end(status.end, lines_max))
    if len(to_json(status)) <= STATUS_BYTES_MAX:
        return status
    container = status.container_status
    if container is not None:
        container = replace(container, container_id=cut(container.container_id, CONTAINER_ID_BYTES_MAX))
    status = replace(
        status,
        message=cut(status.message, MESSAGE_BYTES_MAX),
        err=cut(status.err, ERR_BYTES_MAX),
        container_status=container,
    )
    if len(to_json(status)) <= STATUS_BYTES_MAX:
        return status
    ports = tuple(replace(port, name="") for port in status.port_status.ports)
    while (size := len(to_json(status))) > STATUS_BYTES_MAX or status.port_status.ports != ports:
        if status.port_status.ports == ports:
            ports = ports[: len(ports) * STATUS_BYTES_MAX // size]
        status = replace(status, port_status=PortStatus(ports=ports))
    return status


class StatusReport(msgspec.Struct, frozen=True, kw_only=True):
    """A node's report of one task, with its session."""

    node_id: NodeId
    session_id: SessionId
    task_id: TaskId
    status: TaskStatus


def newer_status(stored: TaskStatus, reported: TaskStatus) -> TaskStatus | None:
    """Return the status to store, or None to keep the stored one.

    A node can report ACCEPTED to REJECTED.  Earlier states are the leader's, later ones the cluster's.
    """
    if not TaskState.ACCEPTED <= reported.state <= TaskState.REJECTED:
        return None
    if reported.state < stored.state or reported == stored:
        return None
    if reported.state == stored.state and stored.state.is_terminal:
        return None  # an end is reported once; repetitions are ignored
    return reported


def record_status(tx: Transaction, report: StatusReport) -> bool:
    """Write a status if it is newer.  Returns whether it was.

    The status of a deleted task is ignored: the node receives an assignment that removes it.

    Raises:
        PermissionDenied: The task belongs to another node.
        SessionInvalid: Another manager has the session, or the node has a later one.
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
    if NOT_PUBLISHED in status.err and (reason := unpublished(tx, task)):
        status = bounded(replace(status, err=f"{status.err}: {reason}"))
    tx.put(replace(task, status=status))
    return True


def record_unpublished(tx: Transaction, report: tuple[NodeId, SessionId, VolumeId]) -> None:
    """Record that a node has unpublished a volume and will not use it again.

    This is the only step of the publish status that the leader does not write.  A late report about a volume that the
    node is not unpublishing is ignored.

    Raises:
        SessionInvalid: Another manager has the session, or the node has a later one.
    """
    node_id, session_id, id = report
    require_session(tx, node_id, session_id)
    volume = tx.rely_on(Volume, id)
    if volume is None:
        return
    statuses = tuple(
        replace(one, state=PublishState.PENDING_UNPUBLISH, message="")
        if one.node_id == node_id and one.state is PublishState.PENDING_NODE_UNPUBLISH
        else one
        for one in volume.publish_status
    )
    if statuses != volume.publish_status:
        tx.put(replace(volume, publish_status=statuses))
