"""Counts the objects that the leader's loops look up for one event, because a count does not depend on the machine."""

from sim.cluster import SimulatedCluster
from sim.run import RunResult
from skep.model.container import ContainerSpec
from skep.model.service import GlobalService, ReplicatedService, ServiceMode, ServiceSpec, TaskSpec
from skep.model.values.ids import NodeId

FEW, MANY = 8, 32
LOOKED_S = 10.0
"""Seconds within which all loops have processed an event."""


def simulate(seed: int) -> RunResult:
    """Compare the cost of a node event in a small cluster with that in one of four times the size."""
    few, many = cost_of_a_node_event(FEW, seed), cost_of_a_node_event(MANY, seed)
    problem = f"one node event visits {many} objects with {MANY} nodes, and {few} with {FEW}"
    return RunResult(seed, [problem] if many >= 2 * few else [], [])


def cost_of_a_node_event(workers: int, seed: int) -> int:
    """Return how many objects the leader looks up for a change of one node, with three global services."""
    with SimulatedCluster(managers=1, workers=workers, seed=seed) as cluster:
        for name in ("agent", "proxy", "logs"):
            cluster.create(_a_spec(name, ServiceMode(global_=GlobalService())))
        cluster.create(_a_spec("web", ServiceMode(replicated=ReplicatedService(replicas=workers))))
        cluster.run_until(lambda: cluster.running("logs") == workers, within_s=60)
        cluster.run_for(60)
        leader = cluster.running_managers[cluster.leader]
        before = leader.visited
        cluster.label(NodeId("w1"), zone="north")
        cluster.run_for(LOOKED_S)
        return leader.visited - before


def _a_spec(name: str, mode: ServiceMode) -> ServiceSpec:
    return ServiceSpec(
        name=name, task_template=TaskSpec(container_spec=ContainerSpec(image="app:1")), mode=mode
    )
