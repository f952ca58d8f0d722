"""The quorum table for 1 to 9 managers: what may be lost, and what one more means."""

import asyncio
from functools import partial

import pytest

from sim.cluster import SimulatedCluster
from skep.errors import Unavailable
from skep.manager.control.services import create_service
from skep.model.service import Service, ServiceSpec
from skep.model.values.ids import NodeId, ServiceId, TaskId
from skep.model.values.times import timestamp
from skep.store.etcd.store import EtcdStore
from skep.store.transactions.updates import NO_LEADER
from tests.support.builders import a_service_spec

TOLERATED = {1: 0, 2: 0, 3: 1, 4: 1, 5: 2, 6: 2, 7: 3, 8: 3, 9: 4}
"""Managers -> how many may be lost.  Source: Docker's documentation, "Administer and maintain a swarm"."""


def a_store(cluster: SimulatedCluster, id: NodeId) -> EtcdStore:
    store = cluster.running_managers[id].store
    assert store is not None
    return store


async def create(store: EtcdStore, spec: ServiceSpec) -> Service:
    """As the API does: a service whose id is its name."""
    await store.barrier()
    body = partial(
        create_service,
        new_id=lambda: spec.name,
        new_name=lambda: spec.name,
        now=timestamp(1_700_000_000_000_000_000),
    )
    return await store.update(body, spec)


def tasks_of(cluster: SimulatedCluster) -> set[TaskId]:
    """Tasks whose containers run somewhere."""
    return {id for node in cluster.nodes.values() for id in node.containers}


@pytest.mark.parametrize(("managers", "seed"), [*((managers, managers) for managers in TOLERATED), (7, 1)])
def test_the_tolerated_loss_stays_writable_and_one_more_does_not_and_loses_nothing(
    managers: int, seed: int
) -> None:
    with SimulatedCluster(managers=managers, workers=3, seed=seed) as cluster:
        cluster.do(create(a_store(cluster, cluster.managers[0]), a_service_spec("first", replicas=3)))
        cluster.run_until(lambda: cluster.running("first") == 3, within_s=10)
        # The leader is among the lost ones: that is the harder half.
        others = [id for id in cluster.managers if id != cluster.leader]
        lost = [cluster.leader, *others][: TOLERATED[managers] + 1]
        for id in lost[:-1]:
            cluster.crash(id)
        left = [id for id in cluster.managers if id not in lost[:-1]]
        if lost[:-1]:
            cluster.run_until(lambda: cluster.raft.has_quorum, within_s=5)
        for id in left:
            cluster.do(create(a_store(cluster, id), a_service_spec(f"by-{id}", replicas=1)))
        cluster.run_until(lambda: all(cluster.running(f"by-{id}") == 1 for id in left), within_s=15)

        before = tasks_of(cluster)
        cluster.crash(lost[-1])
        revision = cluster.raft.kv.revision
        left.remove(lost[-1])
        for id in left:
            with pytest.raises(Unavailable, match="The swarm does not have a leader"):
                cluster.do(create(a_store(cluster, id), a_service_spec("never")))
        cluster.run_for(30)
        assert cluster.raft.kv.revision == revision, "nothing is written without a quorum"
        assert sum(
            cluster.containers(name) for name in ("first", *(f"by-{id}" for id in cluster.managers))
        ) == (3 + len(left) + 1), "containers run on"

        cluster.start_manager(lost[-1])
        cluster.run_until(lambda: cluster.raft.has_quorum, within_s=5)
        cluster.run_until(lambda: cluster.running_managers[lost[-1]].store is not None, within_s=5)
        cluster.do(create(a_store(cluster, lost[-1]), a_service_spec("last", replicas=3)))
        cluster.run_until(lambda: cluster.running("last") == 3, within_s=30)
        cluster.run_for(20)  # longer than any grace
        assert tasks_of(cluster) >= before, "no task was replaced"
        assert cluster.running("first") == 3
        assert cluster.service("never") is None
        for id in lost[:-1]:
            cluster.start_manager(id)
        cluster.run_for(10)
        for id in cluster.managers:
            cluster.do(a_store(cluster, id).barrier())
            assert a_store(cluster, id).view().lookup(Service, ServiceId("first")) is not None
        cluster.check_invariants()


@pytest.mark.parametrize("managers", [number for number, tolerated in TOLERATED.items() if tolerated])
def test_a_minority_that_is_cut_off_with_the_leader_writes_nothing(managers: int) -> None:
    with SimulatedCluster(managers=managers, workers=3, seed=managers) as cluster:
        old = cluster.leader
        minority = [old, *(id for id in cluster.managers if id != old)][: TOLERATED[managers]]
        majority = [id for id in cluster.managers if id not in minority]
        cluster.links.cut(minority, [*majority, *cluster.workers])
        with pytest.raises(Unavailable, match=NO_LEADER[:20]):
            cluster.do(create(a_store(cluster, old), a_service_spec("lost")))
        cluster.run_until(lambda: cluster.raft.has_quorum and cluster.leader in majority, within_s=5)
        cluster.do(create(a_store(cluster, majority[0]), a_service_spec("kept", replicas=2)))
        cluster.run_until(lambda: cluster.running("kept") == 2, within_s=20)
        cluster.links.restore()
        cluster.run_for(10)
        cluster.do(a_store(cluster, old).barrier())
        assert a_store(cluster, old).view().lookup(Service, ServiceId("kept")) is not None
        assert cluster.service("lost") is None
        cluster.check_invariants()


def test_five_managers_with_one_in_maintenance_and_one_killed_stay_writable() -> None:
    with SimulatedCluster(managers=5, workers=3) as cluster:
        cluster.crash(NodeId("m5"))
        cluster.crash(cluster.leader)
        cluster.run_until(lambda: cluster.raft.has_quorum, within_s=5)
        cluster.create(a_service_spec("web", replicas=6))
        cluster.run_until(lambda: cluster.running("web") == 6, within_s=20)
        cluster.check_invariants()


def test_requests_that_wait_without_a_leader_all_get_dockers_sentence() -> None:
    with SimulatedCluster(managers=3, workers=2) as cluster:
        cluster.crash(NodeId("m2"))
        cluster.crash(NodeId("m3"))
        store = a_store(cluster, NodeId("m1"))

        async def ask() -> list[BaseException | None]:
            return await asyncio.gather(*(store.barrier() for _ in range(5)), return_exceptions=True)

        assert [str(error) for error in cluster.do(ask())] == [NO_LEADER] * 5
