"""Explains why a task waits for a cluster volume on its node, with the report of the volume's driver."""

from skep.model.task import Task
from skep.model.task_end import printable
from skep.model.values.ids import VolumeId
from skep.model.volume import PublishState, Volume
from skep.store.interface import View


def unpublished(view: View, task: Task) -> str:
    """Return why a volume of the task is not published on its node, or an empty text if all are or the reason is
    unknown.
    """
    for one in task.volumes:
        volume = view.lookup(Volume, VolumeId(one.id))
        status = volume.status_on(task.node_id) if volume is not None else None
        if volume is None or status is None or status.state is PublishState.PUBLISHED:
            continue
        if status.message:
            return printable(f"cluster volume {volume.spec.name}: {status.message}")
    return ""
