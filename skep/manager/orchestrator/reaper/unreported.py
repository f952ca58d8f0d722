"""Tasks that stay in the store until their node has reported their data (decision 159).

With ``skep.volume-affinity=required``, the tasks of a slot start only where the slot's data is, and the leader keeps a
lost node that has the data.  At first managers know the location from the slot's tasks, and later from the node's
report.  A node reports some seconds after a task's start, and managers accept a report only for slots whose tasks they
have seen (decision 81).  So a slot's last task with data on a node must not be deleted before that report.
"""

from collections.abc import Callable, Iterable

from skep.manager.orchestrator.reaper.kept_nodes import has_cut_report
from skep.model.networks.data_planes import is_docker_node
from skep.model.node import Node
from skep.model.options.labels import VolumeAffinity, volume_affinity
from skep.model.options.slot_volumes import (
    FORGOTTEN_LABEL,
    created_ms,
    forgotten_in,
    had_volumes,
    local_volumes,
    may_be,
    slot_volumes_of,
)
from skep.model.service import Service
from skep.model.task import Task
from skep.model.values.ids import NodeId, TaskId


def unreported(
    slot: Iterable[Task], service: Service, node_of: Callable[[NodeId], Node | None]
) -> dict[TaskId, NodeId]:
    """Return the ended tasks of one slot that must stay, with the node whose report they wait for.

    There is at most one for each node.  Docker Engines never report, so nothing waits for them.
    """
    if not keeps_data(service):
        return {}
    latest: dict[NodeId, Task] = {}
    for task in slot:
        if _has_data(task) and task.created_at >= latest.get(task.node_id, task).created_at:
            latest[task.node_id] = task
    return {
        task.id: id
        for id, task in latest.items()
        if (node := node_of(id)) is not None and not _is_reported(task, service, node)
    }


def keeps_data(service: Service) -> bool:
    """Return whether tasks of the service may have to wait for a report."""
    return service.removed_at is None and volume_affinity(service.spec.labels) is VolumeAffinity.REQUIRED


def _has_data(task: Task) -> bool:
    """Return whether the task has ended and has left local volumes on its node."""
    is_over = bool(task.slot) and task.status.state.is_terminal
    return is_over and had_volumes(task) and bool(local_volumes(task.spec))


def _is_reported(task: Task, service: Service, node: Node) -> bool:
    """Return whether the node's report lists each volume of the task, or never will.  Reports about earlier tasks do
    not count.
    """
    if is_docker_node(node) or has_cut_report(node):
        return True
    at_ms, key = created_ms(task), (service.spec.name, task.slot)
    forgotten = forgotten_in(node.spec.labels.get(FORGOTTEN_LABEL, ""))
    known = {
        one.volume for one in slot_volumes_of(node) if (one.service, one.slot) == key and one.at_ms >= at_ms
    }
    known |= {volume for volume, until_ms in forgotten.items() if until_ms >= at_ms}
    return all(any(may_be(volume, name) for volume in known) for name in local_volumes(task.spec))
