"""Disks that hang or stay slow under a leader that keeps its office."""

import asyncio
from collections.abc import Callable

import pytest
from msgspec.structs import replace

from sim.cluster import SimulatedCluster
from sim.world.committed import Change
from skep.errors import Unavailable
from skep.model.network import Network, NetworkSpec
from skep.model.networks.overlays import VXLAN_OPTION
from skep.model.node import Node, NodeState
from skep.model.service import ReplicatedService, Service, ServiceMode
from skep.model.values.ids import NodeId
from skep.model.values.meta import Driver
from skep.store.etcd import etcd_pb2 as pb
from skep.store.etcd.errors import Uncertain
from skep.store.etcd.requests import etcd_key
from skep.store.interface import Created, Updated, View
from skep.store.keys import LEADER
from tests.support.builders import a_service_spec


def put(number: int) -> pb.TxnRequest:
    """A write of the key ``probe/hang``."""
    request = pb.PutRequest(key=etcd_key("probe/hang"), value=str(number).encode())
    return pb.TxnRequest(success=[pb.RequestOp(request_put=request)])


@pytest.mark.parametrize("managers", [1, 3])
def test_a_hanging_disk_delays_writes_in_order_and_causes_no_election(
    managers: int,
) -> None:
    with SimulatedCluster(managers=managers, workers=1, seed=1) as cluster:
        cluster.run_for(1)
        leader, raft = cluster.leader, cluster.raft
        before = raft.kv.revision
        raft.hang(leader)
        writes = [
            cluster.loop.create_task(raft.write(raft.members[leader], put(number))) for number in range(3)
        ]
        cluster.run_for(20)
        assert raft.kv.revision == before
        assert not any(write.done() for write in writes)
        raft.resume(leader)
        cluster.run_for(0.1)
        revisions = [write.result().header.revision for write in writes]
        assert revisions == sorted(revisions)
        assert revisions[0] > before
        assert cluster.leader == leader


def test_a_member_whose_disk_hangs_neither_votes_nor_wins_an_election() -> None:
    with SimulatedCluster(managers=3, workers=1, seed=1) as cluster:
        cluster.run_for(1)
        old, raft = cluster.leader, cluster.raft
        hanging, other = (id for id in cluster.managers if id != old)
        raft.hang(hanging)
        assert not raft.transfer(hanging)
        cluster.crash(old)
        cluster.run_for(5)
        assert raft.current is None, "one of three could vote"
        raft.resume(hanging)
        cluster.run_until(lambda: raft.current is not None, within_s=5)
        assert cluster.leader in (hanging, other)


def test_what_a_hanging_disk_holds_is_lost_with_its_leader() -> None:
    with SimulatedCluster(managers=3, workers=1, seed=1) as cluster:
        cluster.run_for(1)
        old, raft = cluster.leader, cluster.raft
        raft.hang(old)
        write = cluster.loop.create_task(raft.write(raft.members[old], put(1)))
        cluster.run_for(1)
        cluster.crash(old)
        cluster.run_until(lambda: raft.has_quorum, within_s=5)
        raft.resume(old)
        (outcome,) = cluster.do(_outcomes(write))
        assert isinstance(outcome, Uncertain)
        assert raft.kv.range(pb.RangeRequest(key=etcd_key("probe/hang")), raft.kv.revision).kvs == []


async def _outcomes(*tasks: "asyncio.Task[pb.TxnResponse]") -> list[pb.TxnResponse | BaseException]:
    return await asyncio.gather(*tasks, return_exceptions=True)


def hang_behind(cluster: SimulatedCluster, seconds: float, is_due: Callable[[Change], bool]) -> None:
    """The leader's disk hangs behind the first entry that is due."""

    def hang(change: Change, view: View) -> None:
        if is_due(change):
            cluster.committed.watchers.remove(hang)
            leader = cluster.leader
            cluster.raft.hang(leader)
            cluster.loop.call_later(seconds, cluster.raft.resume, leader)

    cluster.committed.watchers.append(hang)


def scales(change: Change) -> bool:
    return any(
        isinstance(event, Updated) and isinstance(event.new, Service) and event.new.spec.replicas == 1
        for event in change.events
    )


@pytest.mark.parametrize("hangs_s", [4.5, 5.5, 7.0, 21.0, 28.0])
def test_a_slot_is_filled_once_however_long_the_disk_hangs_behind_the_write(hangs_s: float) -> None:
    with SimulatedCluster(managers=1, workers=2, seed=1) as cluster:
        cluster.create(a_service_spec("web", replicas=0))
        cluster.run_for(2)
        hang_behind(cluster, hangs_s, scales)
        one = ServiceMode(replicated=ReplicatedService(replicas=1))
        cluster.update("web", lambda spec: replace(spec, mode=one))
        cluster.run_for(hangs_s + 10)
        assert cluster.created("web") == 1
        assert cluster.running("web") == 1
        assert cluster.observer.violations == []


def a_network(id: str) -> Network:
    return Network(id=id, spec=NetworkSpec(name=id, driver_configuration=Driver(name="overlay")))


@pytest.mark.parametrize("hangs_s", [5.6, 25.0])
def test_two_networks_never_get_one_vxlan_id_or_subnet_however_long_the_disk_hangs(hangs_s: float) -> None:
    with SimulatedCluster(managers=1, workers=2, seed=0) as cluster:
        cluster.run_for(1)
        store = cluster.running_managers[cluster.leader].store
        assert store is not None
        writing = []

        def create_another(change: Change, view: View) -> None:
            if "n1" in created(change):
                writing.append(cluster.loop.create_task(store.update(lambda tx: tx.put(a_network("n2")))))

        def created(change: Change) -> list[str]:
            return [
                event.object.id
                for event in change.events
                if isinstance(event, Created) and isinstance(event.object, Network)
            ]

        cluster.committed.watchers.append(create_another)
        hang_behind(cluster, hangs_s, lambda change: "n2" in created(change))
        cluster.write(lambda tx: tx.put(a_network("n1")))
        cluster.run_for(hangs_s + 10)
        given = [
            (one.id, one.driver_state.options[VXLAN_OPTION], one.ipam_options.configs[0].subnet)
            for one in cluster.view.find(Network)
            if one.ipam_options is not None
        ]
        assert {"n1", "n2"} <= {id for id, _, _ in given}
        assert len({vxlan_id for _, vxlan_id, _ in given}) == len(given)
        assert len({subnet for _, _, subnet in given}) == len(given)


def test_a_leader_that_learns_what_came_of_its_write_keeps_its_term_and_another_does_not() -> None:
    terms: list[int] = []
    with SimulatedCluster(managers=1, workers=2, seed=1) as cluster:

        def count(change: Change, view: View) -> None:
            terms.extend(change.revision for key in change.keys if key.key == LEADER)

        cluster.create(a_service_spec("web", replicas=0))
        cluster.run_for(2)
        cluster.committed.watchers.append(count)
        for replicas, hangs_s, renewed in ((1, 7.0, 0), (2, 35.0, 1)):
            hang_behind(cluster, hangs_s, lambda change: bool(change.events))
            mode = ServiceMode(replicated=ReplicatedService(replicas=replicas))
            cluster.update("web", lambda spec, mode=mode: replace(spec, mode=mode))  # type: ignore[misc]
            cluster.run_for(hangs_s + 10)
            assert (replicas, len(terms)) == (replicas, renewed)
            assert cluster.running("web") == replicas


@pytest.mark.parametrize(
    "entry_s",
    [0.1, 0.4, 1.2, 4.0, *(pytest.param(entry_s, marks=pytest.mark.slow) for entry_s in (0.2, 0.8, 2.0))],
)
def test_a_slow_disk_slows_everything_in_proportion_and_has_a_leader(entry_s: float) -> None:
    """What a serial user gets done in a minute: one write per entry, beside those of the managers."""
    with SimulatedCluster(managers=3, workers=2, seed=3) as cluster:
        cluster.run_for(1)
        for member in cluster.raft.members.values():
            member.stall_s = entry_s
        began, done = cluster.loop.time(), 0
        store = cluster.running_managers[cluster.managers[0]].store
        assert store is not None
        while cluster.loop.time() < began + 60:
            service = Service(id=f"s{done}", spec=a_service_spec(f"s{done}", replicas=1))
            try:
                cluster.do(store.update(lambda tx, service=service: tx.put(service)))  # type: ignore[misc]
            except Unavailable:
                continue
            done += 1
        tasks = sum(cluster.observer.created.values())
        assert done >= 0.6 * 60 / entry_s
        assert tasks >= 0.7 * done
        cluster.run_for(0)  # rules on durations look between steps, and saw none of the minute
        cluster.kill_manager(cluster.leader)
        successor_s = cluster.run_until(
            lambda: any(one.leads for one in cluster.running_managers.values()), within_s=3 + 2 * entry_s
        )
        print(
            f"{entry_s:.1f} s an entry: {done} writes, {tasks} tasks, a successor after {successor_s:.1f} s"
        )
        assert cluster.observer.violations == []


@pytest.mark.parametrize("hangs_s", [9.0, 20.0])
def test_a_node_with_heartbeats_is_ready_though_it_is_marked_down_late(hangs_s: float) -> None:
    """The mark times out while the disk hangs, and is committed after the next heartbeat."""
    w1 = NodeId("w1")
    with SimulatedCluster(managers=1, workers=2, seed=1) as cluster:
        cluster.run_for(20)
        cluster.raft.hang("m1")
        cluster.links.freeze(w1)
        cluster.run_for(hangs_s)
        cluster.links.thaw(w1)
        cluster.run_for(1.5)
        assert cluster.is_ready(w1)
        was_down = False

        def look(change: Change, view: View) -> None:
            nonlocal was_down
            was_down |= view.get(Node, w1).status.state is NodeState.DOWN

        cluster.committed.watchers.append(look)
        cluster.raft.resume("m1")
        cluster.run_for(3)
        assert was_down, "the case that is to be tested"
        assert cluster.is_ready(w1)


def test_history_of_a_write_between_compaction_and_freeing_of_pages_is_discarded_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No other write follows, as in a cluster at rest."""
    with SimulatedCluster(managers=1, workers=0, seed=1) as cluster:
        cluster.run_for(5)
        store = cluster.running_managers["m1"].store
        assert store is not None
        compact = store.client.compact
        compacted: list[int] = []

        async def compact_late(revision: int) -> None:
            await compact(revision)
            compacted.append(revision)
            if len(compacted) == 1:
                await cluster.write_probe("removed")

        monkeypatch.setattr(store.client, "compact", compact_late)

        def has_compacted() -> bool:
            cluster.run_for(1)
            return cluster.do(store.compact(0))

        assert [has_compacted() for _ in range(4)] == [True, True, False, False]
        assert compacted[1] == compacted[0] + 2
