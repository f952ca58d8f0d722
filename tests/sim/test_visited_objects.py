"""How many objects the leader's loops look up for one event.  Decisions are counted, not time."""

from sim.cluster import SimulatedCluster
from skep.model.ids import NodeId
from tests.support.builders import a_service_spec

FEW, MANY = 8, 32
LOOKED_S = 10.0
"""Time in which all loops have looked at an event."""


def cost_of_a_node_event(workers: int) -> int:
    """Number of objects that the leader looks up for a change of one node, with three global services."""
    with SimulatedCluster(managers=1, workers=workers, seed=1) as cluster:
        for name in ("agent", "proxy", "logs"):
            cluster.create(a_service_spec(name, is_global=True))
        cluster.create(a_service_spec("web", replicas=workers))
        cluster.run_until(lambda: cluster.running("logs") == workers, within_s=60)
        cluster.run_for(60)
        leader = cluster.running_managers[cluster.leader]
        before = leader.visited
        cluster.label(NodeId("w1"), zone="north")
        cluster.run_for(LOOKED_S)
        return leader.visited - before


def test_a_node_event_costs_as_much_in_a_cluster_of_four_times_the_size() -> None:
    assert cost_of_a_node_event(MANY) < 2 * cost_of_a_node_event(FEW)
