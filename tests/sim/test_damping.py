"""A fault in a cluster at rest replaces what it ended, and what is stopped for tasks of higher priority."""

from collections import Counter

from msgspec.structs import replace

from sim.cluster import SimulatedCluster
from sim.faults.damping import lose_a_node
from skep.model.options.labels import PREEMPTION, PRIORITY
from skep.model.service import ResourceRequirements, Resources, ServiceSpec
from skep.model.swarm import Swarm
from skep.store.interface import Transaction
from tests.support.builders import a_service_spec

MOST_BYTES = 5 << 30  # more than half of a node's memory


def a_large_spec(name: str, *, replicas: int, priority: int) -> ServiceSpec:
    spec = a_service_spec(name, replicas=replicas)
    reserved = ResourceRequirements(reservations=Resources(memory_bytes=MOST_BYTES))
    template = replace(spec.task_template, resources=reserved)
    return replace(spec, task_template=template, labels={PRIORITY: str(priority)})


def allow_preemption(tx: Transaction) -> None:
    (swarm,) = tx.find(Swarm)
    tx.put(replace(swarm, spec=replace(swarm.spec, labels={PREEMPTION: "true"})))


def test_a_lost_task_of_higher_priority_may_stop_others_of_which_each_is_replaced_once() -> None:
    replaced: Counter[str] = Counter()
    for seed in range(4):
        with SimulatedCluster(managers=1, workers=3, seed=seed) as cluster:
            cluster.write(allow_preemption)
            cluster.create(a_large_spec("web", replicas=2, priority=0))
            cluster.create(a_large_spec("api", replicas=1, priority=10))
            cluster.run_until(
                lambda: cluster.running("web") == 2 and cluster.running("api") == 1, within_s=30
            )
            created = cluster.observer.created.copy()
            lose_a_node(cluster)
            cluster.check_invariants(at_rest=False)
            replaced += cluster.observer.created - created
    assert replaced == {"web": 4, "api": replaced["api"]}, "one task per run, whose node or place is lost"
    assert 0 < replaced["api"] < 4, "both cases"
