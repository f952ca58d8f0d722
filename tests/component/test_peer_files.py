"""What etcd reads of a manager's certificates follows the cluster, without a restart where none is needed."""

from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from msgspec.structs import replace

from skep.agent.certificates import renew
from skep.errors import PermissionDenied
from skep.manager.ca.admission import issued_certificate
from skep.manager.ca.peer_files import REVOKED_FILE, PeerFiles, place_revoked
from skep.manager.ca.rotation import Renewal, request_renewal
from skep.manager.control.nodes import remove_node
from skep.manager.eviction.steps import EVICTION_ID, Eviction
from skep.manager.nodes.revocation import revoke_others
from skep.model.node import ManagerStatus, Node, NodeCertificate, NodeRole, Reachability
from skep.model.values.ids import NodeId, new_id
from skep.model.values.times import timestamp
from skep.security import keypair
from skep.security.tls import client_context
from skep.security.trust import root_digest
from skep.store.kinds import Payload, Revocation
from skep.wire.client import open_channel
from tests.component.test_root_rotation import rotate, rotated
from tests.support.managers.wire_calls import call
from tests.support.managers.wire_rig import CLOCK, MANAGER_ID, Cluster, a_worker, an_agent, put, until


class Etcd:
    """Counts its restarts and notes which roots it found at each."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.found: list[bytes] = []

    async def restart(self) -> None:
        self.found.append((self.directory / keypair.ROOT_FILE).read_bytes())


@pytest.fixture
async def cluster():
    async with Cluster(heartbeat_s=3).serving() as serving, serving.leading():
        yield serving


@pytest.fixture
async def etcd(cluster, tmp_path):
    """The manager with its agent, and what its etcd reads, as at the start of the manager."""
    own, read, kept = tmp_path / "own", tmp_path / "tls", tmp_path / "kept"
    kept.mkdir()
    pair = cluster.pair(MANAGER_ID, NodeRole.MANAGER)
    keypair.save(pair, read)
    place_revoked(read, kept)
    etcd = Etcd(read)
    async with an_agent(cluster, pair, own), cluster.kept_up(own, PeerFiles(read, kept, etcd.restart)):
        yield etcd


def revoked(directory: Path) -> set[str]:
    crl = x509.load_der_x509_crl((directory / REVOKED_FILE).read_bytes())
    return {f"{one.serial_number:x}" for one in crl}


async def test_a_renewed_certificate_is_there_for_the_next_handshake_without_a_restart(cluster, etcd):
    before = keypair.load(etcd.directory)
    await cluster.store.update(request_renewal, Renewal(MANAGER_ID))
    await until(lambda: keypair.load(etcd.directory).certificate_pem != before.certificate_pem)
    assert etcd.found == []


async def test_other_roots_restart_it_once_with_the_files_in_place(cluster, etcd):
    await rotate(cluster)
    await rotated(cluster)
    root = cluster.swarm.tls_info.trust_root.encode()
    await cluster.until(lambda view: view.get(Node, MANAGER_ID).peer_roots == root_digest(root))
    assert etcd.found == [root]
    pair = keypair.load(etcd.directory)
    assert len(pair.chain) == 2  # who still trusts the old root trusts it through the second


async def test_while_one_more_restart_would_cost_the_quorum_it_waits(cluster, etcd, tmp_path):
    async def manager(id: str, reachability: Reachability) -> None:
        status = ManagerStatus(reachability=reachability, addr="127.0.0.1:1")
        info = cluster.swarm.tls_info
        description = replace(cluster.node(MANAGER_ID).description, tls_info=info)
        await put(cluster, Node(id=id, manager_status=status, description=description, peer_roots="done"))

    own = cluster.node(MANAGER_ID)
    await put(
        cluster, replace(own, manager_status=replace(own.manager_status, reachability=Reachability.REACHABLE))
    )
    await rotate(cluster)
    await manager("m2", Reachability.REACHABLE)
    await manager("m3", Reachability.UNREACHABLE)
    await rotated(cluster)
    root = cluster.swarm.tls_info.trust_root.encode()
    await until(lambda: (etcd.directory / keypair.ROOT_FILE).read_bytes() == root)
    assert etcd.found == []
    digest = root_digest(root)
    for id in ("m2", "m3"):
        other = cluster.node(id)
        status = replace(other.manager_status, reachability=Reachability.REACHABLE)
        await put(cluster, replace(other, manager_status=status, peer_roots=digest))
    await until(lambda: etcd.found == [root])


async def test_a_removed_managers_certificates_are_listed_and_a_workers_are_not(cluster, etcd, tmp_path):
    now = datetime.now(UTC)
    certificates = [cluster.pair(new_id(), NodeRole.MANAGER).certificate for _ in range(2)]
    first = issued_certificate(NodeRole.MANAGER, certificates[0], now)
    both = issued_certificate(NodeRole.MANAGER, certificates[1], now, before=first)
    former = Node(id=new_id(), certificate=both)
    await put(cluster, former)
    worker = await a_worker(cluster, tmp_path / "w")
    for id in (worker.identity.node_id, former.id):
        await cluster.store.update(remove_node, id, force=True, now_ns=CLOCK.now_ns())
    wanted = {f"{certificate.serial_number:x}" for certificate in certificates}
    await until(lambda: revoked(etcd.directory) == wanted)
    kept = tmp_path / "kept" / REVOKED_FILE
    await until(lambda: kept.exists() and kept.read_bytes() == (etcd.directory / REVOKED_FILE).read_bytes())
    assert etcd.found == []
    # After a reboot it is there before the store is.
    place_revoked(tmp_path / "tls", tmp_path / "kept")
    assert revoked(etcd.directory) == wanted


@pytest.mark.slow  # beside two busy processors the second renewal is now and then not issued in time
async def test_what_was_had_in_a_managers_name_while_two_roots_were_trusted_is_taken_back(cluster, etcd):
    """Who is evicted has the old root's key, and so can have certificates of the new one issued to others' names."""
    eviction = Eviction(
        node_id=NodeId("gone"),
        hostname="gone",
        was_manager=True,
        asked_by="root@desk",
        asked_through=MANAGER_ID,
        asked_at=timestamp(0),
    )
    away = Node(id=NodeId("away"), certificate=NodeCertificate())
    await put(cluster, Payload(id=EVICTION_ID, data=eviction.encode()), away)
    forged = cluster.pair(MANAGER_ID, NodeRole.MANAGER)
    await rotate(cluster)
    await cluster.until(lambda _: cluster.swarm.rotation is not None)
    had = await renew(cluster.address, forged, CLOCK)
    again = await renew(cluster.address, had, CLOCK)
    await cluster.store.update(lambda tx: tx.delete(Node, "away"))
    await rotated(cluster)
    root = cluster.swarm.tls_info.trust_root.encode()
    await cluster.until(lambda view: view.get(Node, MANAGER_ID).peer_roots == root_digest(root))
    own = keypair.load(etcd.directory)
    for pair in (had, again):
        pair = pair.with_root(root)
        serial = f"{pair.certificate.serial_number:x}"
        await until(lambda serial=serial: serial in revoked(etcd.directory))
        async with open_channel(cluster.address, client_context(pair), "swarm-manager") as channel:
            for name in ("HEARTBEAT", "PINGS"):
                assert "does not belong to it" in str(await call(channel, name))
        with pytest.raises(PermissionDenied, match="does not belong to it"):
            await renew(cluster.address, pair, CLOCK)
    assert f"{own.certificate.serial_number:x}" not in revoked(etcd.directory)
    assert (await renew(cluster.address, own, CLOCK)).identity.role is NodeRole.MANAGER


async def test_a_manager_that_was_just_renewing_takes_its_own_certificate_out_again(cluster, etcd):
    other = cluster.pair(MANAGER_ID, NodeRole.MANAGER)
    await cluster.store.update(request_renewal, Renewal(MANAGER_ID))
    await cluster.until(lambda view: view.get(Node, MANAGER_ID).certificate.serials)
    certificate = issued_certificate(NodeRole.MANAGER, other.certificate, datetime.now(UTC))

    def mistaken(tx):
        node = tx.get(Node, MANAGER_ID)
        serials = (*node.certificate.serials, *certificate.serials)
        tx.put(replace(node, certificate=replace(node.certificate, serials=serials)))
        revoke_others(tx, MANAGER_ID, certificate.serials[0].serial, 0)

    own = cluster.node(MANAGER_ID).certificate.serials[-1].serial
    await cluster.store.update(mistaken)
    await cluster.until(
        lambda view: (
            {one.serial for one in view.get(Revocation, MANAGER_ID).foreign}
            == {certificate.serials[0].serial}
        )
    )
    await until(lambda: revoked(etcd.directory) == {certificate.serials[0].serial})
    assert own not in revoked(etcd.directory)
