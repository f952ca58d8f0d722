"""Rules on cluster volumes: running tasks use a volume only as its access mode allows."""

from collections.abc import Iterable, Iterator
from itertools import combinations
from typing import TypeAlias

from skep.manager.verify.rules import Violation
from skep.model.task import Task
from skep.model.values.ids import NodeId
from skep.model.volume import Volume, VolumeScope, VolumeSharing

Use: TypeAlias = tuple[NodeId, Task]
"""A running task, and its node."""


def shared_volume(volume: Volume, one: Use, other: Use) -> Iterator[Violation]:
    """Yield that two running tasks cannot share the volume."""
    (node_id, task), (other_id, second) = one, other
    mode, id = volume.spec.access_mode, volume.id
    if other_id != node_id and mode.scope is not VolumeScope.MULTI:
        text = f"{node_id} writes to volume {id} with task {task.id}, and {other_id} does with {second.id}"
    elif mode.sharing is VolumeSharing.NONE:
        text = f"tasks {task.id} and {second.id} have volume {id}, which no two tasks may share"
    elif mode.sharing is VolumeSharing.ONE_WRITER and _writes(task, id) and _writes(second, id):
        text = f"tasks {task.id} and {second.id} write to volume {id}, which has one writer"
    else:
        return
    yield Violation("volume", text, (volume, task, second))


def shared_volumes(volume: Volume, users: Iterable[Task]) -> Iterator[Violation]:
    """Yield the pairs of running tasks that cannot share the volume."""
    for one, other in combinations(users, 2):
        yield from shared_volume(volume, (one.node_id, one), (other.node_id, other))


def volumes_of(task: Task) -> set[str]:
    """Return the ids of the cluster volumes that the task has."""
    return {one.id for one in task.volumes}


def _writes(task: Task, id: str) -> bool:
    """Return whether the task mounts the volume at a place where it may write."""
    container = task.spec.container_spec
    targets = {one.target for one in task.volumes if one.id == id}
    mounts = container.mounts if container is not None else ()
    return any(one.target in targets and not one.read_only for one in mounts)
