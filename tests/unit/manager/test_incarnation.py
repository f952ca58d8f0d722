"""Which life of the cluster a manager serves, and what it does when it meets another."""

import asyncio
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.bootstrap import Recovery, load_recovery, save_recovery
from skep.errors import FailedPrecondition
from skep.manager.ca.admission import issued_certificate
from skep.manager.control.nodes import remove_node, update_node
from skep.manager.nodes.revocation import revoke
from skep.manager.storage.incarnation import (
    Incarnation,
    Incarnations,
    Superseded,
    check_incarnations,
    read_incarnations,
    write_incarnations,
)
from skep.manager.storage.recovery import finish_recovery, show_survivor
from skep.model.node import (
    CSIInfo,
    ManagerStatus,
    Node,
    NodeDescription,
    NodeRole,
    NodeSpec,
    NodeState,
    NodeStatus,
    Reachability,
    SessionOwner,
)
from skep.model.task import Task, TaskState, TaskStatus, VolumeAttachment
from skep.model.values.ids import ClusterId, NodeId, SessionId, TaskId, VolumeId
from skep.model.values.meta import Driver
from skep.model.values.times import Timestamp
from skep.model.volume import PublishState, PublishStatus, Volume, VolumeInfo, VolumeSpec
from skep.paths import Paths
from skep.security.authority import Authority
from skep.security.identity import NodeIdentity
from skep.security.keys import new_private_key
from skep.store.interface import Transaction
from skep.store.kinds import Revocation
from skep.store.level import CLUSTER_VOLUMES
from skep.store.memory import MemoryStore

M2 = NodeId("m2")


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    paths = Paths(tmp_path / "data", tmp_path / "run")
    paths.manager.mkdir(parents=True)
    return paths


async def test_a_later_life_stops_a_manager_and_keeps_it_stopped(paths: Paths) -> None:
    incarnation = Incarnation(1)
    running = asyncio.create_task(incarnation.run(paths))
    await asyncio.sleep(0)
    assert incarnation.observe(M2, 1)
    assert not incarnation.observe(M2, 7)
    with pytest.raises(Superseded, match="incarnation 7"):
        await asyncio.wait_for(running, 5)
    with pytest.raises(Superseded, match="docker swarm leave --force"):
        check_incarnations(paths)


async def test_an_earlier_incarnation_is_ignored(paths: Paths) -> None:
    incarnation = Incarnation(7)
    running = asyncio.create_task(incarnation.run(paths))
    await asyncio.sleep(0)
    assert not incarnation.observe(M2, 1)
    assert not incarnation.observe(M2, 0)
    await asyncio.sleep(0)
    assert not running.done()
    running.cancel()
    assert check_incarnations(paths) == Incarnations(served=7)


def test_a_manager_that_begins_the_later_life_itself_is_not_stopped_by_it(paths: Paths) -> None:
    write_incarnations(paths, Incarnations(served=1, later=7))
    write_incarnations(paths, Incarnations(served=8))
    assert check_incarnations(paths) == Incarnations(served=8)


def test_a_damaged_file_says_nothing(paths: Paths) -> None:
    paths.incarnation.write_bytes(b"{")
    assert read_incarnations(paths) == Incarnations()


READY = NodeStatus(state=NodeState.READY)


def a_manager(id: str) -> Node:
    status = ManagerStatus(reachability=Reachability.REACHABLE, leader=id == "m2", addr=f"{id}:2377")
    return Node(id=NodeId(id), spec=NodeSpec(role=NodeRole.MANAGER), manager_status=status, status=READY)


async def test_only_the_survivor_is_shown_as_reachable_and_the_others_may_be_demoted_and_removed() -> None:
    store = MemoryStore(SystemClock())
    session = SessionOwner(manager_id=M2, session_id=SessionId("s"))
    worker = Node(id=NodeId("w1"), spec=NodeSpec(role=NodeRole.WORKER), status=READY, session=session)
    for node in (a_manager("m1"), a_manager("m2"), a_manager("m3"), worker):
        await store.update(lambda tx, node=node: tx.put(node))
    await store.update(show_survivor, NodeId("m1"), "new:2377", Timestamp("2026-12-01T15:15:52Z"))

    shown = {node.id: node.manager_status for node in store.view().find(Node)}
    assert shown[NodeId("m1")] == ManagerStatus(
        leader=True, reachability=Reachability.REACHABLE, addr="new:2377"
    )
    assert shown[M2] is not None
    assert (shown[M2].leader, shown[M2].reachability) == (False, Reachability.UNREACHABLE)
    states = {node.id: node.status.state for node in store.view().find(Node)}
    assert states == {
        "m1": NodeState.READY,
        "m2": NodeState.UNKNOWN,
        "m3": NodeState.UNKNOWN,
        "w1": NodeState.READY,
    }, "there has been no contact with the other managers' nodes"
    assert shown[NodeId("w1")] is None
    session = store.view().get(Node, NodeId("w1")).session
    assert session is not None
    assert session.contact_at == "2026-12-01T15:15:37Z", "one grace period before the loss of the quorum"

    m2 = store.view().get(Node, M2)
    demoted = replace(m2.spec, role=NodeRole.WORKER)
    await store.update(update_node, M2, demoted, m2.version.index)
    await store.update(remove_node, NodeId("m3"), force=True, now_ns=0)
    m1 = store.view().get(Node, NodeId("m1"))
    with pytest.raises(FailedPrecondition, match="last manager"):
        await store.update(update_node, m1.id, replace(m1.spec, role=NodeRole.WORKER), m1.version.index)


def a_certificate(node: str) -> x509.Certificate:
    identity = NodeIdentity(node_id=NodeId(node), cluster_id=ClusterId("c"), role=NodeRole.MANAGER)
    chain = Authority.create().issue(new_private_key().public_key(), identity)
    return x509.load_pem_x509_certificate(chain)


async def test_the_demotion_of_a_restored_manager_revokes_the_certificate_of_the_restore(
    paths: Paths,
) -> None:
    store, certificates = MemoryStore(SystemClock()), [a_certificate("m1"), a_certificate("m1")]
    record = issued_certificate(NodeRole.MANAGER, certificates[0], datetime.now(UTC))
    await store.update(lambda tx: tx.put(replace(a_manager("m1"), certificate=record)))
    save_recovery(paths, Recovery(stage="restored"))
    await finish_recovery(paths, store, NodeId("m1"), "new:2377", certificates[1])
    await store.update(lambda tx: revoke(tx, tx.get(Node, NodeId("m1")), 0, is_removed=False))
    (revocation,) = store.view().find(Revocation)
    assert {one.serial for one in revocation.serials} == {f"{one.serial_number:x}" for one in certificates}


async def test_after_a_restore_a_volume_may_be_on_any_node_with_its_driver(paths: Paths) -> None:
    store = MemoryStore(SystemClock())

    def put(tx: Transaction) -> None:
        tx.raise_level(CLUSTER_VOLUMES)
        for id in ("w1", "w2", "w3"):
            info = (CSIInfo(plugin_name="d", node_id=f"d-{id}"),) if id != "w3" else ()
            tx.put(Node(id=NodeId(id), description=NodeDescription(csi_info=info), status=READY))
        published = PublishStatus(node_id=NodeId("w1"), state=PublishState.PUBLISHED, driver_node_id="d-w1")
        spec = VolumeSpec(name="data", driver=Driver(name="d"))
        info = VolumeInfo(volume_id="x")
        tx.put(Volume(id=VolumeId("v"), spec=spec, info=info, publish_status=(published,)))
        has = (VolumeAttachment(id="v", source="data", target="/d"),)
        running = TaskStatus(state=TaskState.RUNNING)
        tx.put(Task(id=TaskId("t"), node_id=NodeId("w1"), volumes=has, status=running))

    await store.update(put)
    await finish_recovery(paths, store, NodeId("w1"), "new:2377", a_certificate("w1"))
    assert store.view().get(Volume, VolumeId("v")).publish_status[0].state is PublishState.PUBLISHED
    save_recovery(paths, Recovery(stage="restored"))
    await finish_recovery(paths, store, NodeId("w1"), "new:2377", a_certificate("w1"))
    assert load_recovery(paths) is None
    found = store.view().get(Volume, VolumeId("v")).publish_status
    assert [(one.node_id, one.state) for one in found] == [
        ("w1", PublishState.PENDING),
        ("w2", PublishState.PENDING_NODE_UNPUBLISH),
    ]
