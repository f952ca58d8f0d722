"""Which cluster volumes a task can have on a node: by topology, scope, sharing and availability.

A volume for one node stays with the node on which it is published until nothing of it is left there: the scheduler
waits for that instead of having two nodes write to one disk.

Source: swarmkit, manager/scheduler/volumes.go.
"""

from collections.abc import Iterable, Iterator, Sequence

import msgspec

from skep.model.ids import NodeId, TaskId, VolumeId
from skep.model.node import CSIInfo, Node
from skep.model.task import Task, VolumeAttachment
from skep.model.volume import (
    GROUP_PREFIX,
    Volume,
    VolumeAvailability,
    VolumeScope,
    VolumeSharing,
    fits_topology,
    room_for_nodes,
)


class ClusterMount(msgspec.Struct, frozen=True):
    """A mount of type ``cluster``; ``source``: a volume's name, or ``group:`` and the name of a group."""

    source: str
    target: str
    read_only: bool


class VolumeUse(msgspec.Struct, frozen=True):
    """A volume that a task has."""

    volume_id: VolumeId
    read_only: bool


class VolumeUses:
    """All cluster volumes, and the tasks that have them."""

    def __init__(self) -> None:
        self._volumes: dict[VolumeId, Volume] = {}
        self._room: dict[VolumeId, int] = {}
        """On how many more nodes each can be published."""
        self._uses: dict[VolumeId, dict[TaskId, tuple[NodeId, bool]]] = {}
        """Volume -> task -> its node, and whether it only reads."""

    def set_volume(self, volume: Volume) -> None:
        """A volume was created or changed."""
        self._volumes[volume.id] = volume
        self._room[volume.id] = room_for_nodes(volume)

    def remove_volume(self, id: VolumeId) -> None:
        """A volume was removed."""
        self._volumes.pop(id, None)
        self._room.pop(id, None)

    def hold(self, task_id: TaskId, node_id: NodeId, uses: Iterable[VolumeUse]) -> None:
        """A task on a node has volumes."""
        for use in uses:
            self._uses.setdefault(use.volume_id, {})[task_id] = node_id, use.read_only

    def release(self, task_id: TaskId, uses: Iterable[VolumeUse]) -> None:
        """A task has them no more."""
        for use in uses:
            users = self._uses.get(use.volume_id, {})
            users.pop(task_id, None)
            if not users:
                self._uses.pop(use.volume_id, None)

    def choose(self, mounts: Sequence[ClusterMount], node: Node) -> tuple[VolumeAttachment, ...] | str:
        """The volumes for a task's mounts on a node; a sentence: why there are none."""
        chosen: list[VolumeAttachment] = []
        taken: dict[VolumeId, list[bool]] = {}
        for mount in mounts:
            reasons: list[str] = []
            for volume in self._candidates(mount.source, node.id):
                why = self._refusal(volume, mount, node, taken.get(volume.id, []))
                if not why:
                    chosen.append(VolumeAttachment(id=volume.id, source=mount.source, target=mount.target))
                    taken.setdefault(volume.id, []).append(mount.read_only)
                    break
                reasons.append(why)
            else:
                return "; ".join(reasons[:_REASONS_MAX]) or f"no such cluster volume: {mount.source}"
        return tuple(chosen)

    def _candidates(self, source: str, node_id: NodeId) -> Sequence[Volume]:
        """Those that a mount may mean: of a group those that are there already first, then the least used."""
        name = source.removeprefix(GROUP_PREFIX)
        if name == source:
            return [one for one in self._volumes.values() if one.spec.name == name]
        group = [one for one in self._volumes.values() if one.spec.group == name]
        return sorted(
            group,
            key=lambda one: (one.status_on(node_id) is None, len(self._uses.get(one.id, ())), one.spec.name),
        )

    def _refusal(self, volume: Volume, mount: ClusterMount, node: Node, taken: Sequence[bool]) -> str:
        """Why the task cannot have the volume on the node; empty: it can.  ``taken``: by its other mounts."""
        name, spec = f"cluster volume {volume.spec.name}", volume.spec
        info = _info_of(node, spec.driver.name)
        users = self._uses.get(volume.id, {})
        readers = [*(read_only for _, read_only in users.values()), *taken]
        status = volume.status_on(node.id)
        elsewhere = {
            *(one.node_id for one in volume.publish_status),
            *(node_id for node_id, _ in users.values()),
        } - {node.id}
        if volume.pending_delete:
            return f"{name} is being deleted"
        if volume.info is None:
            return f"{name} is not created yet" + (f": {volume.message}" if volume.message else "")
        if spec.availability is not VolumeAvailability.ACTIVE:
            return f"{name} has availability {spec.availability.value}"
        if info is None:
            return f"{name} needs driver {spec.driver.name}, which the node does not have"
        if not fits_topology(info.accessible_topology, volume.info.accessible_topology):
            return f"{name} is not accessible from the node"
        if spec.access_mode.scope is VolumeScope.SINGLE and elsewhere:
            return f"{name} is on another node"
        if status is not None and not status.takes_tasks:
            return f"{name} is being unpublished from the node"
        if why := _sharing_refusal(spec.access_mode.sharing, readers, read_only=mount.read_only):
            return f"{name} {why}"
        announced = elsewhere.difference(one.node_id for one in volume.publish_status)
        if status is None and len(announced) >= self._room[volume.id]:
            return f"{name} is on as many nodes as can be kept of one volume: {len(elsewhere)}"
        if status is None and not self._has_room(node, info):
            return (
                f"{name}: the node has its {info.max_volumes_per_node} volumes of driver {info.plugin_name}"
            )
        return ""

    def _has_room(self, node: Node, info: CSIInfo) -> bool:
        if not info.max_volumes_per_node:
            return True
        return sum(1 for _ in self._on(node.id, info.plugin_name)) < info.max_volumes_per_node

    def _on(self, node_id: NodeId, driver: str) -> Iterator[Volume]:
        for volume in self._volumes.values():
            users = self._uses.get(volume.id, {}).values()
            if volume.spec.driver.name == driver and (
                volume.status_on(node_id) is not None or any(id == node_id for id, _ in users)
            ):
                yield volume


_REASONS_MAX = 3


def still_fits(volume: Volume | None, node_id: NodeId) -> bool:
    """Whether a volume that was chosen for a node can still go there, as far as the volume says."""
    if volume is None or volume.info is None or volume.pending_delete:
        return False
    is_single = volume.spec.access_mode.scope is VolumeScope.SINGLE
    return volume.spec.availability is VolumeAvailability.ACTIVE and not any(
        is_single if status.node_id != node_id else not status.takes_tasks for status in volume.publish_status
    )


def uses_of(task: Task) -> tuple[VolumeUse, ...]:
    """The volumes that a task has; one is only read if all its mounts only read."""
    container = task.spec.container_spec
    mounts = {(one.source, one.target): one.read_only for one in container.mounts} if container else {}
    reading: dict[VolumeId, bool] = {}
    for one in task.volumes:
        id = VolumeId(one.id)
        reading[id] = reading.get(id, True) and mounts.get((one.source, one.target), False)
    return tuple(VolumeUse(id, read_only) for id, read_only in reading.items())


def _sharing_refusal(sharing: VolumeSharing, readers: Sequence[bool], *, read_only: bool) -> str:
    """``readers``: per present user whether it only reads."""
    match sharing:
        case VolumeSharing.NONE if readers:
            return "is another task's"
        case VolumeSharing.ONE_WRITER if not read_only and not all(readers):
            return "has a writer"
        case VolumeSharing.READ_ONLY if not read_only:
            return "is read-only: mount it with readonly"
        case _:
            return ""


def _info_of(node: Node, driver: str) -> CSIInfo | None:
    return next((one for one in node.description.csi_info if one.plugin_name == driver), None)
