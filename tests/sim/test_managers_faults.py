"""Faults of managers and their members: what is pretended is what it says, and what has to go on does."""

from functools import partial

import pytest
from msgspec.structs import replace

from sim.cluster import SimulatedCluster
from sim.faults.targeted_faults import hang_manager
from sim.world.committed import Change
from sim.world.links import Port
from skep.errors import Unavailable
from skep.model.node import Node, NodeRole
from skep.model.values.ids import NodeId
from skep.store.etcd import etcd_pb2 as pb
from skep.store.etcd.errors import OutOfSpace
from skep.store.etcd.requests import etcd_key
from skep.store.interface import View
from skep.store.space import QUOTA_BYTES, refusal
from tests.support.builders import a_service_spec


def test_a_hung_manager_receives_nothing_and_its_member_continues() -> None:
    with SimulatedCluster(managers=3, workers=1, seed=1) as cluster:
        hung, other = NodeId("m1"), NodeId("m2")
        end = hang_manager(cluster, hung, for_s=1.0)
        assert not cluster.links.reaches(other, hung)
        assert cluster.links.is_joined(other, hung, Port.PEER)
        member = cluster.raft.members[hung]
        cluster.run_for(0.2)
        cluster.create(a_service_spec("web", replicas=1))
        cluster.run_for(0.2)
        assert member.applied == cluster.raft.kv.revision
        end()
        cluster.run_for(0.1)
        assert cluster.links.is_joined(other, hung)
        assert not cluster.disturbances


def test_a_manager_that_is_killed_behind_a_write_writes_nothing_more() -> None:
    with SimulatedCluster(managers=3, workers=2, seed=2) as cluster:
        killed, written = cluster.leader, list[int]()

        def kill(change: Change, view: View) -> None:
            if change.origin == killed:
                written.append(change.revision)
                if len(written) == 1:
                    cluster.loop.call_soon(cluster.kill_manager, killed)

        cluster.committed.watchers.append(kill)
        cluster.create(
            a_service_spec("web", replicas=3)
        )  # of which a leader makes tasks, and then gives them nodes
        cluster.run_until(lambda: cluster.running("web") == 3, within_s=30)
        assert len(written) == 1
        assert cluster.leader != killed
        cluster.crash(killed)
        cluster.start_manager(killed)
        cluster.run_until(lambda: cluster.running_managers[killed].store is not None, within_s=10)


def test_a_manager_whose_member_is_down_does_not_count_for_the_quorum_of_a_demotion() -> None:
    """Its manager answers pings: seed 8002191 at commit 7b34ef5a."""
    with SimulatedCluster(managers=3, workers=1, seed=1) as cluster:
        cluster.run_for(2)
        down, demoted = (id for id in cluster.managers if id != cluster.leader)
        cluster.raft.crash(down)  # its manager continues: the disk has no space, for example
        cluster.run_for(5)
        node = cluster.view.get(Node, demoted)
        cluster.write(lambda tx: tx.put(replace(node, spec=replace(node.spec, role=NodeRole.WORKER))))
        cluster.run_for(10)
        assert demoted in cluster.raft.members
        assert cluster.raft.has_quorum
        cluster.raft.start(down)
        cluster.run_until(lambda: demoted not in cluster.raft.members, within_s=10)
        assert cluster.raft.has_quorum


def test_a_manager_that_stops_reports_that_its_vote_does_not_count() -> None:
    """A leader waits for the outcome of its writes when it stops, and answers pings meanwhile."""
    with SimulatedCluster(managers=3, workers=1, seed=1) as cluster:
        dispatcher = cluster.running_managers[cluster.leader].dispatcher
        assert dispatcher is not None
        cluster.run_for(2)
        assert not dispatcher.reports.own.is_without_quorum
        cluster.do(cluster.end_manager(cluster.leader))
        assert dispatcher.reports.own.is_without_quorum


@pytest.mark.parametrize("managers", [1, 3])
def test_a_full_store_refuses_plain_writes_and_users_and_has_room_again_by_itself(managers: int) -> None:
    with SimulatedCluster(managers=managers, workers=2, seed=3) as cluster:
        cluster.create(a_service_spec("web", replicas=2))
        space = cluster.raft.space
        space.fill(cluster.managers, live=QUOTA_BYTES * 9 // 10, old=QUOTA_BYTES // 2)
        assert space.has_alarm
        member = cluster.raft.members[cluster.leader]
        put = pb.RequestOp(request_put=pb.PutRequest(key=etcd_key("probe/plain"), value=b""))
        with pytest.raises(OutOfSpace):
            cluster.do(cluster.raft.write(member, pb.TxnRequest(success=[put])))
        store = cluster.running_managers[cluster.leader].store
        assert store is not None
        assert refusal(cluster.do(store.space()), creates=True)
        cluster.run_until(lambda: cluster.running("web") == 2, within_s=10)  # the leader goes on
        cluster.do(cluster.write_probe("removed"))
        space.old, space.live = space.old + space.live, 0
        cluster.run_until(lambda: not space.has_alarm and not space.in_use, within_s=90)
        assert all(space.file(id) < QUOTA_BYTES for id in cluster.managers)
        cluster.check_invariants()


def test_without_space_a_member_ends_and_its_manager_has_its_store_again_afterwards() -> None:
    with SimulatedCluster(managers=3, workers=1, seed=4) as cluster:
        full = next(id for id in cluster.managers if id != cluster.leader)
        store = cluster.running_managers[full].store
        assert store is not None
        cluster.raft.crash(full)
        cluster.run_for(15)
        with pytest.raises(Unavailable):
            cluster.do(store.barrier())
        cluster.raft.start(full)
        cluster.run_until(partial(_answers, cluster, full), within_s=10)


def _answers(cluster: SimulatedCluster, id: NodeId) -> bool:
    store = cluster.running_managers[id].store
    return store is not None and store.is_current
