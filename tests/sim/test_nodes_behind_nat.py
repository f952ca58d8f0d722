"""Workers behind one NAT: they can open connections, and nobody to them."""

import pytest

from sim.cluster import SimulatedCluster
from sim.initial_state import CLUSTER
from skep.errors import Unavailable
from skep.manager.discovery.derive import node_on
from skep.manager.probes.nat import NatPlan, members_of
from skep.model.network import Network
from skep.model.networks.data_planes import claimed_underlay, nat_of, tunnel_address
from skep.model.node import Node, NodeRole
from skep.model.values.ids import NodeId
from skep.security.identity import NodeIdentity
from tests.support.builders import a_service_spec

BEHIND = (NodeId("w1"), NodeId("w2"))


@pytest.mark.parametrize("seed", range(4))
def test_workers_behind_one_nat_are_nodes_like_any_other(seed: int) -> None:
    """Also after the loss of the leader and of one of them."""
    cluster = SimulatedCluster(managers=3, workers=4, seed=seed)
    for id in BEHIND:
        cluster.put_behind_nat(id)
    with cluster:
        cluster.create(a_service_spec("web", replicas=8))
        cluster.run_until(lambda: cluster.running("web") == 8, within_s=30)
        nodes = [cluster.view.get(Node, id) for id in cluster.workers]
        assert {node.id for node in nodes if nat_of(node)} == set(BEHIND)
        assert {node.status.addr for node in nodes if nat_of(node)} == {"203.0.113.1"}
        (ingress,) = (one for one in cluster.view.find(Network) if one.spec.ingress)
        for id in BEHIND:
            node = cluster.view.get(Node, id)
            claiming = [one for one in nodes if claimed_underlay(one) == claimed_underlay(node)]
            entry = node_on(node, ingress, claiming)
            assert entry is not None
            assert entry.underlay == tunnel_address(id)
        assert NatPlan(members_of(nodes)).way(*BEHIND) == "tunnel"
        cluster.crash(cluster.leader)
        cluster.run_for(5)
        cluster.kill_node(BEHIND[0])
        cluster.run_until(lambda: cluster.running("web") == 8, within_s=60)
        cluster.start_all()
        cluster.run_until(lambda: all(map(cluster.is_ready, cluster.workers)), within_s=60)
        cluster.run_for(20)
        cluster.check_invariants()
        assert cluster.network.dialed_in_vain == []


def test_a_connection_to_a_machine_behind_nat_is_noted() -> None:
    cluster = SimulatedCluster(managers=1, workers=1)
    cluster.put_behind_nat(NodeId("w1"))
    identity = NodeIdentity(node_id=NodeId("m1"), cluster_id=CLUSTER, role=NodeRole.MANAGER)

    async def dial() -> None:
        with pytest.raises(Unavailable):
            async with cluster.network.connect("w1:2374", identity):
                pass

    with cluster:
        cluster.do(dial())
        assert cluster.network.dialed_in_vain == [("m1", "w1")]
