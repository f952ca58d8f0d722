"""Nodes that are lost for good, in a simulated cluster that is set to remove them."""

import pytest
from msgspec.structs import replace

from sim.cluster import SimulatedCluster
from skep.model.node import Node, NodeState
from skep.model.options.labels import FORGET_NODES, ON_DISCONNECT
from skep.model.swarm import Swarm
from skep.model.values.ids import NodeId
from skep.store.interface import Transaction
from skep.store.kinds import Revocation
from tests.support.builders import a_service_spec

W1 = NodeId("w1")
AFTER_S = 120.0


def keep_for(cluster: SimulatedCluster, duration: str = "2m") -> None:
    def body(tx: Transaction) -> None:
        (swarm,) = tx.find(Swarm)
        tx.put(replace(swarm, spec=replace(swarm.spec, labels={FORGET_NODES: duration})))

    cluster.write(body)


def known(cluster: SimulatedCluster) -> set[str]:
    return {node.id for node in cluster.view.find(Node)}


@pytest.mark.parametrize("seed", range(2))
def test_a_lost_worker_is_removed_in_time_under_changing_leaders_and_its_tasks_run_elsewhere(
    seed: int,
) -> None:
    with SimulatedCluster(managers=3, workers=4, seed=seed) as cluster:
        keep_for(cluster)
        cluster.create(a_service_spec("web", replicas=8))
        cluster.run_until(lambda: cluster.running("web") == 8, within_s=20)
        before = known(cluster)
        cluster.kill_node(W1)
        cluster.run_for(AFTER_S - 10)
        assert known(cluster) == before
        if seed % 2:
            cluster.depose()  # the new leader has to see it for as long
            cluster.run_for(AFTER_S - 30)
            assert known(cluster) == before
        cluster.run_until(lambda: known(cluster) == before - {W1}, within_s=60)
        assert cluster.view.lookup(Revocation, W1) is not None
        assert cluster.running("web") == 8
        cluster.check_invariants()


def test_after_the_loss_of_most_nodes_none_is_removed_until_most_are_back() -> None:
    with SimulatedCluster(managers=3, workers=6, seed=1) as cluster:
        keep_for(cluster)
        before = known(cluster)
        for id in cluster.workers:
            cluster.kill_node(id)
        cluster.run_for(2 * AFTER_S)
        assert known(cluster) == before
        for id in cluster.workers[1:]:
            cluster.start_node(id)
        cluster.run_for(
            AFTER_S - 10
        )  # it was down for longer, but in a loss of power: it may be the last to start
        assert known(cluster) == before
        cluster.run_until(lambda: known(cluster) == before - {cluster.workers[0]}, within_s=60)


def test_after_a_loss_of_power_nodes_that_start_later_than_others_are_kept() -> None:
    with SimulatedCluster(managers=3, workers=6, seed=3) as cluster:
        keep_for(cluster)
        before = known(cluster)
        for id in cluster.workers:
            cluster.kill_node(id)
        cluster.run_for(2 * AFTER_S)
        for id in cluster.workers[:3]:
            cluster.start_node(id)
        cluster.run_for(40)
        for id in cluster.workers[3:]:
            cluster.start_node(id)
        cluster.run_for(2 * AFTER_S)
        assert known(cluster) == before


def test_a_node_that_is_back_is_kept_and_so_are_managers_and_nodes_with_tasks_to_keep() -> None:
    with SimulatedCluster(managers=3, workers=3, seed=2) as cluster:
        keep_for(cluster)
        labels = {ON_DISCONNECT: "keep"}
        cluster.create(replace(a_service_spec("data", is_global=True), labels=labels))
        cluster.run_until(lambda: cluster.running("data") == 3, within_s=20)
        before = known(cluster)
        manager = next(id for id in cluster.managers if id != cluster.leader)
        cluster.crash(manager)
        cluster.kill_node(W1)
        cluster.kill_node(NodeId("w2"))
        cluster.run_for(60)
        cluster.start_node(NodeId("w2"))
        cluster.run_for(3 * AFTER_S)
        assert known(cluster) == before
        assert cluster.view.get(Node, W1).status.state is NodeState.DOWN
        assert cluster.view.get(Node, NodeId("w2")).status.state is NodeState.READY
