"""Decides which cluster volumes a task can use on a node, by topology, scope, sharing and availability.

A volume with scope single stays on the node where it is published until it is completely unpublished there.  The
scheduler waits for that, so that two nodes never write to one disk.

Source: swarmkit, manager/scheduler/volumes.go.
"""

import bisect
import heapq
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice
from operator import gt
from typing import TypeAlias

from skep.model.needs import ClusterMount, VolumeUse, sources_of
from skep.model.node import CSIInfo, Node
from skep.model.task import VolumeAttachment
from skep.model.values.counts import counted
from skep.model.values.ids import NodeId, TaskId, VolumeId
from skep.model.volume import (
    PublishStatus,
    Volume,
    VolumeAvailability,
    VolumeScope,
    VolumeSharing,
    fits_topology,
    room_for_nodes,
)


class _Known:
    """A volume, if it exists, and the nodes that use it."""

    def __init__(self) -> None:
        self.volume: Volume | None = None
        self.takes_tasks: dict[NodeId, bool] = {}
        """Nodes of its publish entries, and whether more tasks may use it there."""
        self.free_nodes = 0
        """Number of additional nodes on which it can be published."""
        self.users: dict[TaskId, tuple[NodeId, bool]] = {}
        """Tasks that use it, with their nodes, and whether they only read."""
        self.writers = 0
        self.by_node: Counter[NodeId] = Counter()
        """Number of users per node."""
        self.announced: set[NodeId] = set()
        """Nodes with users and without a publish entry."""

    def is_on(self, node_id: NodeId) -> bool:
        return node_id in self.takes_tasks or node_id in self.by_node

    @property
    def limits(self) -> tuple[int, ...]:
        """Limits of the volume and its users for a node where the volume is not published yet.  If any value is 0 or
        less, the node cannot use it.  If a value grows, check excluded nodes again.
        """
        volume = self.volume
        if volume is None:
            return 0, 0, 0, 0, 0
        mode = volume.spec.access_mode
        places = len(self.takes_tasks) + len(self.announced)
        return (
            volume.info is not None
            and not volume.pending_delete
            and volume.spec.availability is VolumeAvailability.ACTIVE,
            mode.scope is not VolumeScope.SINGLE or 1 - places,
            mode.sharing is not VolumeSharing.NONE or not self.users,
            mode.sharing is not VolumeSharing.ONE_WRITER or not self.writers,
            min(1, self.free_nodes - len(self.announced)),
        )

    @property
    def is_open(self) -> bool:
        """Whether a node on which it is not published can use it, at least read-only."""
        is_usable, has_scope, has_sharing, _, has_space = self.limits
        return min(is_usable, has_scope, has_sharing, has_space) > 0


_Order: TypeAlias = tuple[int, str, VolumeId]
"""Number of users, then name.  The least used volume of a group is chosen first."""


class _Candidates:
    """The volumes that a mount's source may refer to, in order, so that a volume for a node is found without checking
    each.
    """

    def __init__(self) -> None:
        self.all: list[_Order] = []
        self.open: list[_Order] = []
        """Volumes that can be published on another node."""
        self._places: dict[VolumeId, tuple[_Order, bool]] = {}

    def enter(self, known: _Known, volume: Volume) -> None:
        self.leave(volume.id)
        order = len(known.users), volume.spec.name, volume.id
        self._places[volume.id] = order, known.is_open
        bisect.insort(self.all, order)
        if known.is_open:
            bisect.insort(self.open, order)

    def leave(self, id: VolumeId) -> None:
        if (place := self._places.pop(id, None)) is not None:
            order, is_open = place
            for orders in (self.all, self.open) if is_open else (self.all,):
                del orders[bisect.bisect_left(orders, order)]

    def of(self, id: VolumeId) -> _Order | None:
        place = self._places.get(id)
        return place[0] if place is not None else None


class VolumeUses:
    """All cluster volumes, and the tasks that use them."""

    def __init__(self) -> None:
        self._known: dict[VolumeId, _Known] = {}
        self._by_source: dict[str, _Candidates] = {}
        self._on: dict[NodeId, Counter[VolumeId]] = {}
        """Volumes with an entry or users on a node, and the number of these."""

    def set_volume(self, volume: Volume) -> tuple[Sequence[NodeId], bool]:
        """Record a volume that was created or changed.

        Returns the nodes whose entries changed, and whether a node that was excluded may now be able to use it.
        """
        known = self._known.setdefault(volume.id, _Known())
        before, limits = known.volume, known.limits
        changed = self._set_entries(volume.id, known, volume.publish_status)
        if before is not None and sources_of(before) != sources_of(volume):
            self._leave(before)
        known.volume = volume
        known.free_nodes = room_for_nodes(volume)
        self._enter(known)
        is_new = before is None or (before.spec, before.info) != (volume.spec, volume.info)
        return changed, is_new or any(map(gt, known.limits, limits))

    def remove_volume(self, id: VolumeId) -> Sequence[NodeId]:
        """Remove a volume.  Returns the nodes where it was used."""
        known = self._known.get(id)
        if known is None or known.volume is None:
            return ()
        nodes = sorted(known.takes_tasks.keys() | known.by_node.keys())
        self._set_entries(id, known, ())
        self._leave(known.volume)
        known.volume = None
        self._drop_unused(id, known)
        return nodes

    def hold(self, task_id: TaskId, node_id: NodeId, uses: Iterable[VolumeUse]) -> None:
        """Record the volumes of a task on a node."""
        for use in uses:
            known = self._known.setdefault(use.volume_id, _Known())
            known.users[task_id] = node_id, use.read_only
            known.writers += not use.read_only
            known.by_node[node_id] += 1
            if node_id not in known.takes_tasks:
                known.announced.add(node_id)
            self._count(node_id, use.volume_id, 1)
            self._enter(known)

    def release(self, task_id: TaskId, uses: Iterable[VolumeUse]) -> Sequence[VolumeId]:
        """Remove a task's volumes.  Returns volumes that a node may be able to use now although it could not
        before.
        """
        freed = []
        for use in uses:
            known = self._known.get(use.volume_id)
            if known is None or task_id not in known.users:
                continue
            limits = known.limits
            node_id, read_only = known.users.pop(task_id)
            known.writers -= not read_only
            known.by_node[node_id] -= 1
            if not known.by_node[node_id]:
                del known.by_node[node_id]
                known.announced.discard(node_id)
            self._count(node_id, use.volume_id, -1)
            self._enter(known)
            if any(map(gt, known.limits, limits)):
                freed.append(use.volume_id)
            self._drop_unused(use.volume_id, known)
        return freed

    def has_users(self, id: VolumeId, node_id: NodeId) -> bool:
        """Return whether tasks on the node use the volume."""
        known = self._known.get(id)
        return known is not None and known.by_node[node_id] > 0

    def drivers_of(self, ids: Iterable[VolumeId], mounts: Iterable[ClusterMount]) -> Collection[str]:
        """Return the drivers of the volumes in ``ids`` that the mounts may refer to."""
        sources = {mount.source for mount in mounts}
        volumes = (known.volume for id in ids if (known := self._known.get(id)) is not None)
        return {one.spec.driver.name for one in volumes if one and not sources.isdisjoint(sources_of(one))}

    def is_leaving(self, mounts: Iterable[ClusterMount], node_id: NodeId) -> bool:
        """Return whether a volume for one of the mounts is being unpublished from the node.

        The node can use it again soon, unless another node takes it.
        """
        leaving = [
            id for id in self._on.get(node_id, ()) if self._known[id].takes_tasks.get(node_id) is False
        ]
        candidates = [self._by_source.get(mount.source, _Candidates()) for mount in mounts]
        return any(found.of(id) is not None for id in leaving for found in candidates)

    def choose(self, mounts: Sequence[ClusterMount], node: Node) -> tuple[VolumeAttachment, ...] | str:
        """Return the volumes for a task's mounts on a node, or a sentence that says why it cannot have them."""
        chosen: list[VolumeAttachment] = []
        taken: dict[VolumeId, list[bool]] = {}
        for mount in mounts:
            candidates = self._by_source.get(mount.source, _Candidates())
            for id in self._in_order(candidates, candidates.open, node.id):
                if not self._refusal(id, mount, node, taken.get(id, ())):
                    chosen.append(VolumeAttachment(id=id, source=mount.source, target=mount.target))
                    taken.setdefault(id, []).append(mount.read_only)
                    break
            else:
                first = islice(self._in_order(candidates, candidates.all, node.id), _REASONS_MAX)
                reasons = [self._refusal(id, mount, node, taken.get(id, ())) for id in first]
                return "; ".join(reasons) or f"no such cluster volume: {mount.source}"
        return tuple(chosen)

    def _in_order(
        self, candidates: _Candidates, elsewhere: Sequence[_Order], node_id: NodeId
    ) -> Iterator[VolumeId]:
        """Yield the volumes on the node first, then the least used.  Others are limited to ``elsewhere``."""
        there: list[_Order] = []
        announced: list[_Order] = []
        for id in self._on.get(node_id, ()):
            if (order := candidates.of(id)) is not None:
                (there if node_id in self._known[id].takes_tasks else announced).append(order)
        yield from (id for *_, id in sorted(there))
        others = (order for order in elsewhere if not self._known[order[-1]].is_on(node_id))
        yield from (id for *_, id in heapq.merge(sorted(announced), others))

    def _refusal(self, id: VolumeId, mount: ClusterMount, node: Node, taken: Sequence[bool]) -> str:
        """Return why the task cannot use the volume on the node, or "".  ``taken`` has the uses by its other mounts."""
        known = self._known[id]
        volume = known.volume
        assert volume is not None, "it is a candidate"
        name, spec = f"cluster volume {volume.spec.name}", volume.spec
        info = _info_of(node, spec.driver.name)
        is_entered = node.id in known.takes_tasks
        elsewhere = len(known.takes_tasks) + len(known.announced) - known.is_on(node.id)
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
        if is_entered and not known.takes_tasks[node.id]:
            return f"{name} is being unpublished from the node"
        users, writers = len(known.users) + len(taken), known.writers + list(taken).count(False)
        if why := _sharing_refusal(spec.access_mode.sharing, users, writers, read_only=mount.read_only):
            return f"{name} {why}"
        if not is_entered and len(known.announced) - (node.id in known.announced) >= known.free_nodes:
            return f"{name} is already on {counted(elsewhere, 'node')}, the maximum for one volume"
        if not is_entered and not self._is_below_limit(node, info):
            most = info.max_volumes_per_node
            return (
                f"{name}: the node is at its limit of {counted(most, 'volume')} of driver {info.plugin_name}"
            )
        return ""

    def _is_below_limit(self, node: Node, info: CSIInfo) -> bool:
        if not info.max_volumes_per_node:
            return True
        volumes = (self._known[id].volume for id in self._on.get(node.id, ()))
        count = sum(1 for one in volumes if one is not None and one.spec.driver.name == info.plugin_name)
        return count < info.max_volumes_per_node

    def _set_entries(self, id: VolumeId, known: _Known, entries: Iterable[PublishStatus]) -> Sequence[NodeId]:
        """Set the publish entries.  Returns the nodes whose entries changed in a way that matters to tasks."""
        before = known.takes_tasks
        known.takes_tasks = {one.node_id: one.takes_tasks for one in entries}
        changed = sorted(dict(before.items() ^ known.takes_tasks.items()))
        for node_id in changed:
            self._count(node_id, id, (node_id in known.takes_tasks) - (node_id in before))
        known.announced = known.by_node.keys() - known.takes_tasks.keys()
        return changed

    def _count(self, node_id: NodeId, id: VolumeId, more: int) -> None:
        on = self._on.setdefault(node_id, Counter())
        on[id] += more
        if not on[id]:
            del on[id]
        if not on:
            del self._on[node_id]

    def _enter(self, known: _Known) -> None:
        if known.volume is not None:
            for source in sources_of(known.volume):
                self._by_source.setdefault(source, _Candidates()).enter(known, known.volume)

    def _leave(self, volume: Volume) -> None:
        for source in sources_of(volume):
            self._by_source[source].leave(volume.id)
            if not self._by_source[source].all:
                del self._by_source[source]

    def _drop_unused(self, id: VolumeId, known: _Known) -> None:
        if known.volume is None and not known.users:
            del self._known[id]


_REASONS_MAX = 3
"""Volumes whose refusals are listed."""


def still_fits(volume: Volume | None, node_id: NodeId) -> bool:
    """Return whether a volume that was chosen for a node can still be used there, by the volume's own state."""
    if volume is None or volume.info is None or volume.pending_delete:
        return False
    is_single = volume.spec.access_mode.scope is VolumeScope.SINGLE
    return volume.spec.availability is VolumeAvailability.ACTIVE and not any(
        is_single if status.node_id != node_id else not status.takes_tasks for status in volume.publish_status
    )


def _sharing_refusal(sharing: VolumeSharing, users: int, writers: int, *, read_only: bool) -> str:
    """Return why the volume cannot be shared with its current ``users`` and ``writers``, or an empty string."""
    match sharing:
        case VolumeSharing.NONE if users:
            return "is in use by another task"
        case VolumeSharing.ONE_WRITER if not read_only and writers:
            return "already has a writer"
        case VolumeSharing.READ_ONLY if not read_only:
            return "is read-only: mount it with readonly"
        case _:
            return ""


def _info_of(node: Node, driver: str) -> CSIInfo | None:
    return next((one for one in node.description.csi_info if one.plugin_name == driver), None)
