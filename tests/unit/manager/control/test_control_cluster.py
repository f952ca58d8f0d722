"""Operations on nodes and on the cluster, on a store in memory."""

from datetime import UTC, datetime

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.errors import FailedPrecondition, InvalidArgument, OutOfSequence
from skep.manager.control.nodes import NodeUpdateBody, node_spec, remove_node, update_node
from skep.manager.control.swarm import Rotations, found_swarm, unlock_key_of, update_swarm
from skep.manager.orchestrator.replacement.disruption_mode import end_freeze
from skep.model.network import Network
from skep.model.node import (
    Availability,
    ManagerStatus,
    Node,
    NodeRole,
    NodeSpec,
    NodeState,
    NodeStatus,
    Reachability,
)
from skep.model.swarm import DEFAULT_SWARM_SPEC, EncryptionConfig, Freeze, JoinTokens, Swarm, SwarmSpec
from skep.model.task import Task, TaskState
from skep.model.values.ids import ClusterId, NodeId, VolumeId, new_id
from skep.model.values.meta import TLSInfo
from skep.model.values.times import Timestamp
from skep.model.volume import PublishState, PublishStatus, Volume, VolumeSpec
from skep.security.tokens import check_root, parse_token
from skep.store.interface import Transaction
from skep.store.memory import MemoryStore
from tests.support.builders import a_node, a_task

NOW = Timestamp("2026-01-02T03:04:05Z")
TODAY = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
ROOT = "-----BEGIN CERTIFICATE-----\n"


def a_manager_node(id: str, *, reachable: bool = True) -> Node:
    state = Reachability.REACHABLE if reachable else Reachability.UNREACHABLE
    return Node(
        id=NodeId(id),
        spec=NodeSpec(role=NodeRole.MANAGER),
        status=NodeStatus(state=NodeState.READY),
        manager_status=ManagerStatus(reachability=state),
    )


@pytest.fixture
async def store():
    store = MemoryStore(SystemClock())
    await store.update(found, SwarmSpec(), a_manager_node("m1"))
    return store


def found(tx, spec: SwarmSpec, node: Node) -> Swarm:
    swarm = Swarm(
        id=ClusterId("c"),
        created_at=NOW,
        spec=replace(DEFAULT_SWARM_SPEC, encryption_config=spec.encryption_config),
        tls_info=TLSInfo(trust_root=ROOT),
        join_tokens=JoinTokens(worker="w", manager="m"),
    )
    return found_swarm(tx, swarm, node, new_id)


def the_swarm(store) -> Swarm:
    (swarm,) = store.view().find(Swarm)
    return swarm


async def test_a_cluster_begins_with_its_node_and_its_networks(store):
    view = store.view()
    assert [node.id for node in view.find(Node)] == ["m1"]
    assert sorted(network.spec.name for network in view.find(Network)) == ["bridge", "host", "ingress"]


async def test_there_is_one_cluster_only(store):
    with pytest.raises(FailedPrecondition):
        await store.update(found, SwarmSpec(), a_manager_node("m2"))


async def test_new_tokens_are_for_the_same_root(store):
    swarm = the_swarm(store)
    changed = await store.update(
        update_swarm, swarm.spec, swarm.version.index, Rotations(worker_token=True), new_id=new_id, now=TODAY
    )
    assert changed.join_tokens.manager == "m"
    check_root(parse_token(changed.join_tokens.worker), ROOT.encode())


async def update(store, *, is_locked: bool, is_rotated: bool = False) -> bytes | None:
    """Update the cluster; its unlock key afterwards."""
    rotations = Rotations(unlock_key=is_rotated)
    swarm = the_swarm(store)
    spec = replace(swarm.spec, encryption_config=EncryptionConfig(auto_lock_managers=is_locked))
    await store.update(update_swarm, spec, swarm.version.index, rotations, new_id=new_id, now=TODAY)
    return unlock_key_of(store.view())


async def test_an_unlock_key_is_there_while_managers_are_locked(store):
    assert unlock_key_of(store.view()) is None
    first = await update(store, is_locked=True)
    assert first is not None
    assert await update(store, is_locked=True) == first
    assert await update(store, is_locked=False) is None
    assert await update(store, is_locked=True) not in (None, first)


async def test_an_unlock_key_is_rotated_only_where_there_is_one(store):
    assert await update(store, is_locked=False, is_rotated=True) is None
    first = await update(store, is_locked=True)
    assert await update(store, is_locked=True, is_rotated=True) not in (None, first)


async def test_a_stale_update_of_the_cluster_is_refused(store):
    with pytest.raises(OutOfSequence):
        await store.update(update_swarm, the_swarm(store).spec, 999, Rotations(), new_id=new_id, now=TODAY)


@pytest.mark.parametrize(
    ("role", "availability", "message"),
    [("king", "active", 'invalid Role: "king"'), ("worker", "", 'invalid Availability: ""')],
)
def test_strange_words_for_a_node_are_refused(role, availability, message):
    with pytest.raises(InvalidArgument, match=message):
        node_spec(NodeUpdateBody(role=role, availability=availability))


def test_words_for_a_node_are_read_without_regard_to_case():
    spec = node_spec(NodeUpdateBody(role="Manager", availability="DRAIN"))
    assert (spec.role, spec.availability) == (NodeRole.MANAGER, Availability.DRAIN)


async def test_the_last_manager_stays_one(store):
    node = store.view().get(Node, "m1")
    with pytest.raises(FailedPrecondition, match="attempting to demote the last manager"):
        await store.update(update_node, node.id, NodeSpec(), node.version.index)


async def test_a_demotion_that_leaves_no_quorum_is_refused(store):
    await store.update(lambda tx: tx.put(a_manager_node("m2")))
    await store.update(lambda tx: tx.put(a_manager_node("m3", reachable=False)))
    node = store.view().get(Node, "m2")
    with pytest.raises(FailedPrecondition, match="loss of quorum"):
        await store.update(update_node, node.id, NodeSpec(), node.version.index)


async def test_a_manager_among_three_can_be_demoted(store):
    await store.update(lambda tx: tx.put(a_manager_node("m2")))
    await store.update(lambda tx: tx.put(a_manager_node("m3")))
    node = store.view().get(Node, "m3")
    changed = await store.update(update_node, node.id, NodeSpec(), node.version.index)
    assert changed.spec.role is NodeRole.WORKER


def cut_off(tx: Transaction, *objects: Node | Task | Volume) -> None:
    """The workers w1 to w3 of four nodes have gone down at once."""
    workers = tuple(NodeId(f"w{number}") for number in (1, 2, 3))
    before = {NodeId("w4"): Timestamp("2025-12-24T00:00:00Z")}
    freeze = Freeze(
        since=Timestamp("2026-01-01T00:00:00Z"), nodes=workers, ready_before=4, down_before=before
    )
    (swarm,) = tx.find(Swarm)
    tx.put(replace(swarm, freeze=freeze))
    for one in (*(a_node(id, state=NodeState.DOWN) for id in workers), *objects):
        tx.put(one)


PUBLISHED = Volume(
    id=VolumeId("v1"),
    spec=VolumeSpec(name="data"),
    publish_status=(PublishStatus(node_id=NodeId("w1"), state=PublishState.PUBLISHED),),
)


@pytest.mark.parametrize("held", [a_task("t1", node="w1", state=TaskState.RUNNING), PUBLISHED])
async def test_a_node_that_may_be_cut_off_with_most_others_is_removed_by_force_only(store, held):
    await store.update(cut_off, held)
    with pytest.raises(FailedPrecondition, match=r"w1 went down at once with 3 of 4 nodes.* --force"):
        await store.update(remove_node, NodeId("w1"), force=False, now_ns=0)
    await store.update(remove_node, NodeId("w1"), force=True, now_ns=0)
    assert store.view().lookup(Node, "w1") is None


async def test_a_node_that_may_be_cut_off_is_removed_after_the_replacement_was_resumed(store):
    await store.update(cut_off, a_task("t1", node="w1", state=TaskState.RUNNING))
    await store.update(end_freeze)
    await store.update(remove_node, NodeId("w1"), force=False, now_ns=0)


async def test_a_node_on_which_nothing_can_run_is_removed_at_any_time(store):
    """As after `docker swarm leave` on all workers, which were drained before."""
    await store.update(cut_off, a_task("t1", node="w1", state=TaskState.SHUTDOWN))
    await store.update(remove_node, NodeId("w1"), force=False, now_ns=0)


async def test_a_node_that_failed_at_another_time_is_removed_while_others_are_cut_off(store):
    w4 = replace(a_node("w4", state=NodeState.DOWN), silent_since=Timestamp("2025-12-24T00:00:00Z"))
    await store.update(cut_off, w4, a_task("t1", node="w4", state=TaskState.RUNNING))
    await store.update(remove_node, NodeId("w4"), force=False, now_ns=0)


@pytest.mark.parametrize("node", ["w4", "w5"])
async def test_a_node_that_fails_while_others_are_cut_off_is_removed_by_force_only(store, node):
    """The freeze begins at more than half of the nodes.  The last ones are marked down a moment later."""
    late = replace(a_node(node, state=NodeState.DOWN), silent_since=Timestamp("2026-01-01T00:00:01Z"))
    await store.update(cut_off, late, a_task("t1", node=node, state=TaskState.RUNNING))
    with pytest.raises(FailedPrecondition, match=f"{node} went down while 3 of 4 nodes are down.* --force"):
        await store.update(remove_node, NodeId(node), force=False, now_ns=0)
    await store.update(remove_node, NodeId(node), force=True, now_ns=0)


async def test_a_node_that_is_up_is_removed_by_force_only(store):
    await store.update(lambda tx: tx.put(Node(id=NodeId("w1"), status=NodeStatus(state=NodeState.READY))))
    with pytest.raises(FailedPrecondition, match="node w1 is not down and can't be removed"):
        await store.update(remove_node, NodeId("w1"), force=False, now_ns=0)
    await store.update(remove_node, NodeId("w1"), force=True, now_ns=0)
    assert store.view().lookup(Node, "w1") is None


@pytest.mark.parametrize("availability", Availability)
async def test_a_node_that_is_no_longer_drained_loses_the_label_for_drains_at_once(store, availability):
    await store.update(lambda tx: tx.put(a_node("n1")))
    labels = {"skep.drain-now": "true", "zone": "a"}
    spec = NodeSpec(labels=labels, availability=availability)
    version = store.view().get(Node, "n1").version.index
    node = await store.update(lambda tx: update_node(tx, NodeId("n1"), spec, version))
    assert node.spec.labels == (labels if availability is Availability.DRAIN else {"zone": "a"})
