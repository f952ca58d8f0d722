"""Decides the next steps for one cluster volume, from its stored state and the nodes that need it.  Pure.

Each driver call is announced in the store before it is made.  So the store always shows where a volume may be,
whichever manager made a call and whatever its result was.  An entry on a node only moves forward::

    (none) -> pending-publish -> published -> pending-node-unpublish -> pending-controller-unpublish -> (none)
                     |                |                                              ^
                     +----------------+-- not needed and never sent, or the node was removed

The node receives a volume while it is ``published``, and the order to unmount it in ``pending-node-unpublish``.  Only
the node's report, or its removal from the cluster, ends that state.  Before the order is sent, the entry is *closing*
for one step.  An assignment by the scheduler compares the volume, so after that commit no further task can use it.
Therefore a volume is never taken from a node that may be using it.  A volume with scope single is announced for a
second node only once the first has no entry.

The store can be wrong in two cases: after the restore of a backup, which is older than the last calls, and if a driver
has an earlier volume with the same name.  Then every node that has the driver is ordered to unpublish the volume
(``doubted``), except for nodes whose tasks need it.  A volume with scope single is published there once all other nodes
have done so.

Source: swarmkit, manager/csi/manager.go, manager/scheduler/volumes.go (freeVolumes).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from typing import TypeAlias

import msgspec
from msgspec.structs import replace

from skep.model.node import Node, NodeState, Topology
from skep.model.node_reports.node_removal import NodeRemoval
from skep.model.values.ids import NodeId
from skep.model.values.times import SECOND_NS, unix_ns
from skep.model.volume import (
    ENTRIES_BYTES_MAX,
    PublishState,
    PublishStatus,
    Volume,
    VolumeScope,
    entry_bytes,
    fits_topology,
    room_for_nodes,
)

FindNode: TypeAlias = Callable[[NodeId], Node | None]

REMOVED_S = 30.0
"""Seconds from the removal of a node until its single-writer volumes may be published elsewhere.

The node reaches a manager within seconds, and stops its containers within ``agent.tasks.worker.REMOVED_GRACE_S``.
"""

_NAMES_MAX = 5
"""Maximum nodes that a message names."""


class CreateVolume(msgspec.Struct, frozen=True):
    """Let the driver create the volume, or return the existing one.  Announced by ``is_creating``."""


class Delete(msgspec.Struct, frozen=True):
    """Let the driver delete the volume."""


class Publish(msgspec.Struct, frozen=True):
    """Let the driver's controller make the volume available on a node."""

    node_id: NodeId
    driver_node_id: str


class Unpublish(msgspec.Struct, frozen=True):
    """Let the driver's controller undo ``Publish``."""

    node_id: NodeId
    driver_node_id: str


class Forget(msgspec.Struct, frozen=True):
    """Remove the object, because the driver never got a request for the volume, or has deleted it."""


Step: TypeAlias = CreateVolume | Delete | Publish | Unpublish | Forget


def settled(volume: Volume, needed: Set[NodeId], node: FindNode) -> Volume:
    """Return ``volume`` with the changes that follow from ``needed`` without a driver call.

    Args:
        needed: The nodes with a task that has the volume and has not ended.
    """
    if volume.info is None:
        return volume
    driver = volume.spec.driver.name
    statuses = [
        moved
        for status in volume.publish_status
        if (moved := _moved(status, status.node_id in needed, node(status.node_id), driver)) is not None
    ]
    there = {status.node_id for status in statuses}
    free_entries = room_for_nodes(replace(volume, publish_status=tuple(statuses)))
    for id in sorted(needed - there)[
        :free_entries
    ]:  # the others follow when some of these entries are removed
        if volume.spec.access_mode.scope is VolumeScope.SINGLE and statuses:
            break
        statuses.append(_found(PublishStatus(node_id=id), node(id), driver))
    if volume.spec.access_mode.scope is VolumeScope.SINGLE:
        statuses = [_with_others(status, statuses, node) for status in statuses]
    return replace(volume, publish_status=tuple(sorted(statuses, key=lambda one: one.node_id)))


def doubted(volume: Volume, needed: Set[NodeId], nodes: Iterable[Node]) -> Volume:
    """Return ``volume`` with entries on every node from which it is accessible, because it may be there whatever the
    store says.

    Applying it twice changes nothing.  If space runs out, nodes without an entry are left out.
    """
    driver = volume.spec.driver.name
    accessible = volume.info.accessible_topology if volume.info is not None else ()
    by_id = {node.id: node for node in nodes}
    statuses = [_found(one, by_id.get(one.node_id), driver) for one in volume.publish_status]
    left = ENTRIES_BYTES_MAX - sum(map(entry_bytes, statuses))
    for _, node in sorted(by_id.items()):
        if volume.status_on(node.id) is not None:
            continue
        found = _found(PublishStatus(node_id=node.id), node, driver)
        if found.driver_node_id and _is_accessible(node, driver, accessible):
            left -= entry_bytes(_doubtful(found, node.id in needed))
            if left < 0:
                break
            statuses.append(found)
    # In a call to the driver, an empty node id would mean all nodes.
    entries = [_doubtful(one, one.node_id in needed) if one.driver_node_id else one for one in statuses]
    return replace(
        volume,
        is_creating=volume.info is None,  # the driver may have got a request for it since
        publish_status=tuple(sorted(entries, key=lambda one: one.node_id)),
    )


def _is_accessible(node: Node, driver: str, places: tuple[Topology, ...]) -> bool:
    infos = (one for one in node.description.csi_info if one.plugin_name == driver)
    return any(fits_topology(one.accessible_topology, places) for one in infos)


def _doubtful(status: PublishStatus, is_needed: bool) -> PublishStatus:
    state = PublishState.PENDING if is_needed else PublishState.PENDING_NODE_UNPUBLISH
    return replace(status, state=state, publish_context={}, is_closing=False, is_doubtful=True, message="")


def steps(volume: Volume, needed: Set[NodeId]) -> Iterator[Step]:
    """Yield the driver calls that a ``settled`` volume needs now, independent of each other."""
    if volume.info is None:
        # A volume that was requested may exist, so its id is requested again in order to delete it.
        yield Forget() if volume.pending_delete and not volume.is_creating else CreateVolume()
        return
    if volume.pending_delete and not volume.publish_status and not needed:
        yield Delete()
    is_elsewhere = volume.spec.access_mode.scope is VolumeScope.SINGLE and len(volume.publish_status) > 1
    for status in volume.publish_status:
        if status.state is PublishState.PENDING and status.driver_node_id and not is_elsewhere:
            yield Publish(status.node_id, status.driver_node_id)
        elif status.state is PublishState.PENDING_UNPUBLISH:
            yield Unpublish(status.node_id, status.driver_node_id)


def removal_wait_s(step: Step, volume: Volume, removal: NodeRemoval | None, now_ns: int) -> float:
    """Return how many seconds ``step`` has to wait because a removed node may still write to the volume.

    Args:
        removal: Removal of the step's node, or None if that node was not removed.
    """
    if not isinstance(step, Unpublish) or removal is None or not removal.at:
        return 0.0
    if volume.spec.access_mode.scope is not VolumeScope.SINGLE:
        return 0.0
    left_s = REMOVED_S - (now_ns - unix_ns(removal.at)) / SECOND_NS
    return min(max(left_s, 0.0), REMOVED_S)  # the clock of the manager that removed it may be ahead


def _moved(status: PublishStatus, is_needed: bool, node: Node | None, driver: str) -> PublishStatus | None:
    """Return the next state of the entry, or None if nothing of the volume is on that node."""
    match status.state:
        case PublishState.PENDING if is_needed and node is not None:
            return _found(status, node, driver)
        case PublishState.PENDING if status.is_doubtful and node is not None:
            return replace(status, state=PublishState.PENDING_NODE_UNPUBLISH, message="")
        case PublishState.PENDING:
            # If the node's id is missing, no call was made. Otherwise a call may have reached the driver.
            return replace(status, state=PublishState.PENDING_UNPUBLISH) if status.driver_node_id else None
        case PublishState.PUBLISHED if node is None:
            return replace(status, state=PublishState.PENDING_UNPUBLISH, message="")
        case PublishState.PUBLISHED if is_needed or not status.is_closing:
            return replace(status, is_closing=not is_needed)
        case PublishState.PUBLISHED:
            return _waiting(
                replace(status, state=PublishState.PENDING_NODE_UNPUBLISH, is_closing=False), node
            )
        case PublishState.PENDING_NODE_UNPUBLISH if node is None:
            # A user who removes a node confirms that it runs nothing.  The leader itself removes no node with an entry
            # (``reaper.kept_nodes``), because it cannot know that.
            return replace(status, state=PublishState.PENDING_UNPUBLISH, message="")
        case PublishState.PENDING_NODE_UNPUBLISH:
            return _waiting(status, node)
        case _:
            return status


def _found(status: PublishStatus, node: Node | None, driver: str) -> PublishStatus:
    """Add the node's id in the driver.  The first id is kept, because calls may have been made with it."""
    if status.driver_node_id or node is None:
        return status
    for info in node.description.csi_info:
        if info.plugin_name == driver and info.node_id:
            return replace(status, driver_node_id=info.node_id, message="")
    return replace(status, message=f"node {_name(node)} has no driver {driver}")


def _with_others(status: PublishStatus, statuses: Sequence[PublishStatus], node: FindNode) -> PublishStatus:
    """Add the nodes that the entry of a single-node volume waits for to its message."""
    others = [one.node_id for one in statuses if one.node_id != status.node_id]
    if status.state is not PublishState.PENDING or not others:
        return status
    found = [(id, node(id)) for id in others[:_NAMES_MAX]]
    names = ", ".join(_name(one) if one is not None else id for id, one in found)
    return replace(status, message=f"waiting for confirmation that it is not mounted on {names}")


def _waiting(status: PublishStatus, node: Node | None) -> PublishStatus:
    """Add the reason why the node does not unpublish the volume, if it is known."""
    if node is None or node.status.state is NodeState.READY:
        return replace(status, message="")
    words = "the volume counts as mounted there until it returns, or is removed from the cluster"
    return replace(status, message=f"node {_name(node)} is {node.status.state.value}: {words}")


def _name(node: Node) -> str:
    return node.shown_name
