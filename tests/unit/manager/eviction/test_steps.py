"""What an eviction is, who may be evicted, and in which order what a node knew is taken back."""

import random
from datetime import UTC, datetime

import pytest
from msgspec.structs import replace

from skep.aio.clock import SystemClock
from skep.errors import FailedPrecondition, NotFound
from skep.manager.control.nodes import remove_node
from skep.manager.eviction.steps import (
    MANAGER_STEPS,
    SEVERAL_NODES_STEPS,
    TEXTS,
    WORKER_STEPS,
    begin,
    eviction_of,
    has_new_root,
    note_done,
    note_waiting,
    remove_evicted,
    replace_gossip_keys,
)
from skep.manager.gossip.keys import first_keys
from skep.model.networks.gossip import decoded_keys
from skep.model.node import (
    EngineDescription,
    IssuedSerial,
    ManagerStatus,
    Node,
    NodeCertificate,
    NodeDescription,
    NodeRole,
    NodeSpec,
    NodeState,
    NodeStatus,
    Reachability,
)
from skep.model.swarm import RootRotation, Swarm
from skep.model.values.ids import ClusterId, NodeId, VolumeId
from skep.model.values.times import timestamp
from skep.model.volume import AccessMode, PublishState, PublishStatus, Volume, VolumeScope, VolumeSpec
from skep.security.authority import Authority
from skep.security.trust import tls_info
from skep.store.kinds import GOSSIP_KEYS_ID, NEXT_ROOT_KEY_ID, ROOT_KEY_ID, Payload, Revocation
from skep.store.memory import MemoryStore

NOW_NS = int(datetime.now(UTC).timestamp()) * 10**9
NOW = timestamp(NOW_NS)
OWN = NodeId("manager1")
ROOTS = [Authority.create().root_pem for _ in range(2)]


def a_node(id: str, role: NodeRole, *, name: str = "") -> Node:
    is_manager = role is NodeRole.MANAGER
    serials = (IssuedSerial(serial="a1", not_after=timestamp(NOW_NS + 10**15)),) if is_manager else ()
    status = ManagerStatus(reachability=Reachability.REACHABLE, addr=f"{id}:1") if is_manager else None
    return Node(
        id=NodeId(id),
        spec=NodeSpec(role=role),
        description=NodeDescription(hostname=name or id, engine=EngineDescription()),
        status=NodeStatus(state=NodeState.READY),
        certificate=NodeCertificate(role=role, state="issued", serials=serials),
        manager_status=status,
    )


@pytest.fixture
async def store() -> MemoryStore:
    """Three managers and a worker."""
    store = MemoryStore(SystemClock())

    def found(tx):
        tx.put(Swarm(id=ClusterId("c"), tls_info=tls_info(ROOTS[0])))
        tx.put(Payload(id=ROOT_KEY_ID, data=b"key"))
        for number in (1, 2, 3):
            tx.put(a_node(f"manager{number}", NodeRole.MANAGER, name=f"m{number}"))
        tx.put(a_node("worker1", NodeRole.WORKER, name="w1"))

    await store.update(found)
    return store


async def evict(store: MemoryStore, word: str, **options: bool):
    return await store.update(begin, word, "root@desk", OWN, NOW, **options)


async def test_every_step_says_what_is_true_afterwards():
    assert set(MANAGER_STEPS) | set(WORKER_STEPS) == set(TEXTS)
    assert MANAGER_STEPS.index("keys") < MANAGER_STEPS.index("root")
    assert MANAGER_STEPS[0] == WORKER_STEPS[0] == "remove"


@pytest.mark.parametrize("word", ["manager3", "m3", "manager3"[:8]])
async def test_a_manager_is_evicted_by_name_or_id_and_the_requester_is_recorded(store, word):
    eviction = await evict(store, word)
    assert eviction == eviction_of(store.view())
    assert (eviction.node_id, eviction.hostname, eviction.was_manager) == ("manager3", "m3", True)
    assert (eviction.asked_by, eviction.asked_through, eviction.asked_at) == ("root@desk", OWN, NOW)
    assert eviction.steps == MANAGER_STEPS


async def test_a_root_that_came_before_the_keys_were_replaced_is_replaced_too(store):
    """Its key was written under keys that the node had."""
    eviction = await evict(store, "m3")

    def rotate(tx):
        (swarm,) = tx.find(Swarm)
        tx.put(replace(swarm, tls_info=tls_info(ROOTS[1])))

    await store.update(rotate)
    (swarm,) = store.view().find(Swarm)
    assert has_new_root(eviction_of(store.view()), swarm), "the case that is to be tested"
    await store.update(note_done, eviction.node_id, "keys")
    assert not has_new_root(eviction_of(store.view()), swarm)


async def test_asked_again_it_goes_on(store):
    eviction = await evict(store, "m3")
    await store.update(note_done, eviction.node_id, "remove")
    await store.update(note_waiting, eviction.node_id, "manager m2 cannot be reached")
    again = await evict(store, "m3")
    assert again.next_step == "keys"
    assert again.waits_for == "manager m2 cannot be reached"
    for step in MANAGER_STEPS:
        await store.update(note_done, eviction.node_id, step)
    assert eviction_of(store.view()).next_step is None
    assert (await evict(store, "w1")).steps == WORKER_STEPS


async def test_one_that_waits_becomes_part_of_another(store):
    """What the manager may have had is taken back, too, and what was done for it stays done."""
    first = await evict(store, "m3")
    for step in ("remove", "keys"):
        await store.update(note_done, first.node_id, step)
    await store.update(note_waiting, first.node_id, "worker w9 has not come back")
    both = await evict(store, "w1")
    assert both.nodes == ("worker1", "manager3")
    assert (both.was_manager, both.roots, both.waits_for) == (True, first.roots, "")
    assert (both.done, both.next_step, both.steps) == (("keys",), "remove", SEVERAL_NODES_STEPS)


async def test_invalid_evictions_are_refused(store):
    with pytest.raises(FailedPrecondition, match="cannot evict itself"):
        await evict(store, "m1")
    with pytest.raises(NotFound):
        await evict(store, "m9")
    with pytest.raises(FailedPrecondition, match="ambiguous"):
        await evict(store, "manager")
    other = store.view().get(Node, NodeId("manager2"))
    silent = replace(
        other, manager_status=replace(other.manager_status, reachability=Reachability.UNREACHABLE)
    )
    await store.update(lambda tx: tx.put(silent))
    with pytest.raises(FailedPrecondition, match="loss of quorum"):
        await evict(store, "m3")


async def test_a_manager_that_was_removed_already_is_evicted_by_its_id(store):
    await store.update(lambda tx: tx.put(replace(tx.get(Node, NodeId("manager3")), spec=NodeSpec())))
    await store.update(remove_node, NodeId("manager3"), force=True, now_ns=NOW_NS)
    eviction = await evict(store, "manager3")
    assert eviction.was_manager
    assert await store.update(remove_evicted, eviction.nodes, NOW_NS) == ""


async def test_a_manager_is_demoted_first_and_removed_when_it_has_no_vote(store):
    id = NodeId("manager3")
    assert "vote" in await store.update(remove_evicted, [id], NOW_NS)
    assert store.view().get(Node, id).spec.role is NodeRole.WORKER
    assert "vote" in await store.update(remove_evicted, [id], NOW_NS)

    def withdrawn(tx):
        node = tx.get(Node, id)
        tx.put(
            replace(node, manager_status=None, certificate=replace(node.certificate, role=NodeRole.WORKER))
        )

    await store.update(withdrawn)
    assert await store.update(remove_evicted, [id], NOW_NS) == ""
    assert store.view().lookup(Node, id) is None
    assert store.view().get(Revocation, id).is_removed


@pytest.mark.parametrize("keep", [False, True])
async def test_what_becomes_of_its_containers_is_in_the_record_that_the_node_is_refused_with(store, keep):
    eviction = await evict(store, "w1", keeps_containers=keep)
    await store.update(remove_evicted, eviction.nodes, NOW_NS, keeping=eviction.keeping)
    assert store.view().get(Revocation, NodeId("worker1")).keeps_containers is keep


async def test_one_eviction_keeps_its_containers_though_another_joins_it(store):
    await evict(store, "m3", keeps_containers=True)
    both = await evict(store, "w1")
    assert both.keeping == ("manager3",)


async def test_containers_with_a_volume_for_one_node_are_not_kept(store):
    status = PublishStatus(node_id=NodeId("worker1"), state=PublishState.PUBLISHED)
    spec = VolumeSpec(name="data", access_mode=AccessMode(scope=VolumeScope.SINGLE))
    volume = Volume(id=VolumeId("v"), spec=spec, publish_status=(status,))
    await store.update(lambda tx: tx.put(volume))
    with pytest.raises(FailedPrecondition, match="single-node volume data is on w1"):
        await evict(store, "w1", keeps_containers=True)
    assert (await evict(store, "w1")).keeping == ()


async def test_a_root_whose_key_it_may_have_had_is_no_new_one(store):
    """Not the present one, nor the one to which the cluster was rotating when it was evicted."""
    swarm = store.view().get(Swarm, ClusterId("c"))
    rotating = replace(swarm, rotation=RootRotation(root=ROOTS[1].decode(), cross_signed=""))
    key = Payload(id=NEXT_ROOT_KEY_ID, data=b"key")
    await store.update(lambda tx: [tx.put(rotating), tx.put(key)])
    eviction = await evict(store, "m3")
    assert len(eviction.roots) == 2
    for root in ROOTS:
        assert not has_new_root(eviction, replace(swarm, tls_info=tls_info(root), rotation=None))
    fresh = tls_info(Authority.create().root_pem)
    assert has_new_root(eviction, replace(swarm, tls_info=fresh, rotation=None))
    assert not has_new_root(eviction, replace(rotating, tls_info=fresh))


async def test_a_root_whose_key_an_external_authority_has_stays(store):
    await store.update(lambda tx: tx.delete(Payload, ROOT_KEY_ID))
    eviction = await evict(store, "m3")
    assert eviction.roots == ()
    assert has_new_root(eviction, store.view().get(Swarm, ClusterId("c")))


async def test_docker_nodes_have_new_keys_if_there_are_any(store):
    await store.update(replace_gossip_keys, NOW, random.randbytes)
    assert store.view().lookup(Payload, GOSSIP_KEYS_ID) is None
    before = first_keys(random.randbytes, NOW)
    await store.update(lambda tx: tx.put(Payload(id=GOSSIP_KEYS_ID, data=before.encode())))
    await store.update(replace_gossip_keys, NOW, random.randbytes)
    after = decoded_keys(store.view().get(Payload, GOSSIP_KEYS_ID).data)
    assert after != before
