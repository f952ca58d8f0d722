"""Reads a backup and makes the node that is restored from it.

The node becomes the manager that made the backup, with its id and its tasks.  The certificate is new, made with the
root's key from the backup.
"""

from collections.abc import AsyncIterator
from pathlib import Path

import msgspec

from skep.api.backups import BackupManifest, Opener, RestorePlan
from skep.api.formats.swarm_requests import Endpoints, Interfaces, founding
from skep.errors import SkepError
from skep.linux.files import NEW_SUFFIX, write_new
from skep.model.networks.addresses import host_of, parted
from skep.model.node import NodeRole
from skep.model.swarm import InitRequest
from skep.model.values.ids import ClusterId, NodeId
from skep.node.cluster.founding import key_pair, sole_manager
from skep.node.cluster.local import LocalNode
from skep.security.authority import Authority
from skep.security.identity import NodeIdentity
from skep.security.keypair import KeyPair


class RestoredData(msgspec.Struct, frozen=True, kw_only=True):
    """Data with which a manager continues from a backup.  The file ``snapshot`` is moved to the manager's store."""

    node: LocalNode
    wrapping_key: bytes
    snapshot: Path
    hostname: str


async def receive(pieces: AsyncIterator[bytes], key: bytes, snapshot: Path) -> BackupManifest:
    """Write the snapshot in a backup to the file ``snapshot``.

    The file appears only once the backup is known to be complete.

    Raises: InvalidArgument: not a backup, damaged, or encrypted with another key.
    """
    opener = Opener(key)
    unfinished = snapshot.with_name(snapshot.name + NEW_SUFFIX)
    write_new(unfinished, b"", mode=0o600)
    try:
        with unfinished.open("ab") as file:
            async for piece in pieces:
                file.write(opener.feed(piece))
        manifest = opener.check_whole()
        unfinished.rename(snapshot)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    return manifest


def endpoints_for(manifest: BackupManifest, advertise_addr: str, interfaces: Interfaces) -> Endpoints:
    """Return the addresses of the restored manager.  Raises: InvalidArgument, Untranslated: in Docker's words."""
    _, port = parted(manifest.listen_addr)
    candidates = [advertise_addr] if advertise_addr else [manifest.advertise_addr, ""]
    for candidate in candidates:
        request = InitRequest(listen_addr=f"0.0.0.0:{port}", advertise_addr=candidate)
        try:
            endpoints = founding(request, interfaces).endpoints
        except SkepError:
            if candidate == candidates[-1]:
                raise
            continue
        if candidate == candidates[-1] or host_of(candidate) == endpoints.local_addr:
            return endpoints
    raise AssertionError("the last candidate returns or raises")


def restored_node(manifest: BackupManifest, endpoints: Endpoints) -> tuple[LocalNode, KeyPair]:
    """Return the manager that made the backup, with the addresses in ``endpoints`` and a new certificate.

    Raises: FailedPrecondition: the root in the backup does not match its key.
    """
    authority = Authority.load(manifest.root_key_pem, manifest.root_pem)
    node_id, cluster_id = NodeId(manifest.node_id), ClusterId(manifest.cluster_id)
    identity = NodeIdentity(node_id=node_id, cluster_id=cluster_id, role=NodeRole.MANAGER)
    return sole_manager(identity, endpoints), key_pair(authority, identity, manifest.root_pem)


def plan_of(manifest: BackupManifest, advertise_addr: str, *, is_done: bool) -> RestorePlan:
    """Return the summary of a backup for its user."""
    return RestorePlan(
        cluster_id=manifest.cluster_id,
        node_id=manifest.node_id,
        hostname=manifest.hostname,
        created_at=manifest.created_at,
        incarnation=manifest.incarnation,
        skep_version=manifest.skep_version,
        counts=manifest.counts,
        advertise_addr=advertise_addr,
        is_done=is_done,
    )
