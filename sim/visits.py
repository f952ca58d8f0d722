"""Counts the objects that the leader's loops look up for one event, because a count does not depend on the machine."""

from collections.abc import Callable

from sim.cluster import SimulatedCluster
from sim.run import RunResult
from skep.model.container import ContainerSpec
from skep.model.service import GlobalService, ReplicatedService, ServiceMode, ServiceSpec, TaskSpec
from skep.model.values.ids import NodeId

FEW, MANY = 8, 32
GROWTH_MAX = 1.5
"""Factor by which an event may cost more in the large cluster.  The cost of a scan of all objects at least doubles."""
LOOKED_S = 10.0
"""Seconds within which all loops have processed an event."""


def simulate(seed: int) -> RunResult:
    """Compare the cost of events in a small cluster with that in one of four times the size."""
    problems = []
    for name, event in (("node", _label_a_node), ("task", _end_a_task)):
        few, many = cost_of(event, FEW, seed), cost_of(event, MANY, seed)
        if many > GROWTH_MAX * few:
            problems.append(f"one {name} event visits {many} objects with {MANY} nodes, and {few} with {FEW}")
    return RunResult(seed, problems, [])


def cost_of(event: Callable[[SimulatedCluster], None], workers: int, seed: int) -> int:
    """Return how many objects the leader looks up for an event, with three global services and a replicated one."""
    with SimulatedCluster(managers=1, workers=workers, seed=seed) as cluster:
        for name in ("agent", "proxy", "logs"):
            cluster.create(_a_spec(name, ServiceMode(global_=GlobalService())))
        cluster.create(_a_spec("web", ServiceMode(replicated=ReplicatedService(replicas=workers))))
        cluster.run_until(lambda: cluster.running("logs") == workers, within_s=60)
        cluster.run_for(60)
        leader = cluster.running_managers[cluster.leader]
        before = leader.visited
        event(cluster)
        cluster.run_for(LOOKED_S)
        return leader.visited - before


def _label_a_node(cluster: SimulatedCluster) -> None:
    cluster.label(NodeId("w1"), zone="north")


def _end_a_task(cluster: SimulatedCluster) -> None:
    cluster.kill_container(cluster.wanted("web")[0])


def _a_spec(name: str, mode: ServiceMode) -> ServiceSpec:
    return ServiceSpec(
        name=name, task_template=TaskSpec(container_spec=ContainerSpec(image="app:1")), mode=mode
    )
