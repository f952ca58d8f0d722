"""Disks that hang or stay slow under a leader that keeps its office."""

import asyncio

import pytest

from skep.sim.cluster import SimulatedCluster
from skep.store.etcd import etcd_pb2 as pb
from skep.store.etcd.errors import Uncertain
from skep.store.etcd.requests import etcd_key


def put(number: int) -> pb.TxnRequest:
    """A write of the key ``probe/hang``."""
    request = pb.PutRequest(key=etcd_key("probe/hang"), value=str(number).encode())
    return pb.TxnRequest(success=[pb.RequestOp(request_put=request)])


@pytest.mark.parametrize("managers", [1, 3])
def test_a_disk_that_hangs_writes_nothing_and_then_everything_in_order_and_nobody_else_leads(
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
