"""Recovers the cluster with this manager alone, after the loss of the others or from a backup.

The node process writes a request (``recovery.json``).  The manager process executes it at its next start, before
anything else.  Each step may be interrupted and repeated:

1. *wanted*: A snapshot of this manager's store is taken, or comes from a backup, and becomes a store with new ids and
   without other members.
2. *restored*: The store's incarnation is raised before any client is served, the other managers are shown as
   unreachable, cluster volumes count as mounted on every node, and the request is removed.

The incarnation is the time in seconds, but at least one more than the last.  Two restores of one backup therefore have
different incarnations, and the later one wins.  A manager of an earlier incarnation stops when it meets a later one
(``manager.storage.incarnation``).
"""

import os
from collections.abc import Mapping, Set
from pathlib import Path

import structlog
from cryptography import x509
from msgspec.structs import replace

from skep.aio.clock import Clock
from skep.aio.trees import discard_tree_now
from skep.bootstrap import load_recovery, save_recovery
from skep.linux.files import file_exists
from skep.manager.ca.admission import issued_serial
from skep.manager.nodes.heartbeats import certain_contact
from skep.manager.volumes.records import INFO_PART, PUBLISH_PART
from skep.manager.volumes.steps import doubted
from skep.model.node import UNKNOWN_STATE, ManagerStatus, Node, NodeState, Reachability
from skep.model.task import Task
from skep.model.values.ids import NodeId, VolumeId
from skep.model.values.times import SECOND_NS, Timestamp, unix_ns
from skep.model.volume import Volume
from skep.paths import Paths
from skep.store.etcd.initialize import raise_incarnation
from skep.store.etcd.peers import MEMBERS_FILE
from skep.store.etcd.process.binary import Binary
from skep.store.etcd.process.flags import MemberSettings
from skep.store.etcd.snapshots import restore_store, salvage
from skep.store.interface import Store, Transaction, View

log = structlog.get_logger(__name__)


async def restore_if_wanted(paths: Paths, settings: MemberSettings, binary: Binary, clock: Clock) -> bool:
    """Create the single-member store if that is requested and not done yet.  Returns whether it was created.

    Raises:
        FailedPrecondition: Nothing is left to recover, or etcdutl is missing.
    """
    recovery = load_recovery(paths)
    if recovery is None or recovery.stage != "wanted":
        return False
    snapshot = paths.recovery_snapshot
    if not file_exists(snapshot):
        log.info("taking a snapshot of this manager's store")
        taken = snapshot.with_name(snapshot.name + ".taken")
        is_bare = await salvage(settings, binary, clock, taken)
        recovery = replace(recovery, is_bare=is_bare)
        save_recovery(paths, recovery)
        os.replace(taken, snapshot)
    token = f"{settings.cluster_token}-{clock.now_ns()}"
    alone = replace(settings, is_solo=True, joins=(), cluster_token=token)
    await restore_store(snapshot, alone, binary, is_bare=recovery.is_bare)
    for leftover in (paths.etcd / MEMBERS_FILE, paths.joining_mark):
        leftover.unlink(missing_ok=True)
    save_recovery(paths, replace(recovery, stage="restored"))
    log.warning("store restored with this manager as its only member")
    return True


async def raise_if_restored(paths: Paths, socket: Path, clock: Clock) -> None:
    """Raise the incarnation in the store, if it was restored.  Raises: Unavailable."""
    if load_recovery(paths) is not None:
        incarnation = await raise_incarnation(socket, clock.now_ns() // SECOND_NS)
        log.warning("incarnation of the cluster raised", incarnation=incarnation)


async def finish_recovery(
    paths: Paths, store: Store, node_id: NodeId, addr: str, own: x509.Certificate
) -> None:
    """Write the new status of the nodes and this manager's certificate, and remove the request.

    Raises: Unavailable.
    """
    recovery = load_recovery(paths)
    if recovery is None:
        return
    await store.update(show_survivor, node_id, addr, recovery.lost_at)
    await store.update(record_certificate, node_id, own)
    await doubt_volumes(store)
    paths.recovery.unlink(missing_ok=True)
    paths.recovery_snapshot.unlink(missing_ok=True)
    discard_tree_now(paths.etcd / "data.old")


async def doubt_volumes(store: Store) -> None:
    """Mark the locations of volumes as uncertain, because the store may be older than the actions of nodes and
    drivers.
    """
    needed = _nodes_with_volumes(store.view())
    for volume in store.view().find(Volume):
        await store.update(_doubt_volume, volume.id, needed.get(volume.id, frozenset()))


def _nodes_with_volumes(view: View) -> Mapping[VolumeId, Set[NodeId]]:
    """Return the nodes whose tasks use each cluster volume."""
    found: dict[VolumeId, set[NodeId]] = {}
    for task in view.find(Task):
        if task.node_id and not task.status.state.is_terminal:
            for attachment in task.volumes:
                found.setdefault(VolumeId(attachment.id), set()).add(task.node_id)
    return found


def _doubt_volume(tx: Transaction, id: VolumeId, needed: Set[NodeId]) -> None:
    volume, damaged = tx.get(Volume, id), tx.damaged(Volume).get(id, ())
    if PUBLISH_PART in damaged:
        return
    doubtful = doubted(volume, needed, tx.find(Node))
    tx.put(replace(doubtful, is_creating=volume.is_creating) if INFO_PART in damaged else doubtful)


def record_certificate(tx: Transaction, node_id: NodeId, own: x509.Certificate) -> None:
    """Record the certificate with which this manager runs, which a restore has issued without a store.

    A certificate that is not recorded could not be revoked at etcd's port.
    """
    node, issued = tx.lookup(Node, node_id), issued_serial(own)
    before = node.certificate if node is not None else None
    if node is None or before is None or any(one.serial == issued.serial for one in before.serials):
        return
    certificate = replace(
        before,
        not_after=issued.not_after,
        serials=(*before.serials, issued),
        last_not_after=max(issued.not_after, before.last_not_after),
    )
    tx.put(replace(node, certificate=certificate))


def show_survivor(tx: Transaction, node_id: NodeId, addr: str, lost_at: Timestamp) -> None:
    """Show ``node_id`` as the only reachable manager, so that the others can be demoted and removed.

    Their nodes' state is unknown until they connect.  They get their grace period like all others, and are shown as
    SwarmKit shows nodes after a change of leader (manager/dispatcher/dispatcher.go, markNodesUnknown).

    Args:
        lost_at: As in ``Recovery``.  Without it, nodes that do not connect seem to be lost only now.
    """
    heard_at = certain_contact(tx, unix_ns(lost_at)) if lost_at else None
    for node in tx.find(Node):
        status: ManagerStatus | None = None
        if node.id == node_id:
            status = ManagerStatus(leader=True, reachability=Reachability.REACHABLE, addr=addr)
        elif node.manager_status is not None:
            known = node.manager_status
            status = ManagerStatus(reachability=Reachability.UNREACHABLE, addr=known.addr, has_vote=False)
        changed = replace(node, manager_status=status)
        if node.session is not None and node.session.contact_at is None:
            changed = replace(changed, session=replace(node.session, contact_at=heard_at))
        if status is not None and node.id != node_id and node.status.state is NodeState.READY:
            unknown = replace(node.status, state=NodeState.UNKNOWN, message=UNKNOWN_STATE)
            changed = replace(changed, status=unknown)
        if changed != node:
            tx.put(changed)
