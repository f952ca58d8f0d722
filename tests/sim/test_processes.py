"""Plain processes: they run on nodes that allow them, and users draw them."""

from random import Random

from msgspec.structs import replace

from sim.cluster import SimulatedCluster
from sim.users.random_specs import Dependencies, a_spec, with_image
from sim.world.images import program_of
from skep.manager.control.validation.service_rules import check_service_spec
from skep.model.container import ContainerSpec
from skep.model.permissions.processes import is_process
from skep.model.permissions.rights import ALLOW_LABEL
from skep.model.service import ReplicatedService, ServiceMode, ServiceSpec
from skep.model.values.ids import NodeId
from tests.support.builders import a_service_spec


def as_process(spec: ServiceSpec) -> ServiceSpec:
    container = ContainerSpec(image="scratch", args=("app:1",), labels={"skep.executor": "process"})
    return replace(spec, task_template=replace(spec.task_template, container_spec=container))


def test_a_node_that_no_longer_allows_processes_gets_no_more_of_them() -> None:
    cluster = SimulatedCluster(managers=3, workers=3, seed=1)
    refusing = NodeId("w1")

    def scaled(spec: ServiceSpec) -> ServiceSpec:
        return replace(spec, mode=ServiceMode(replicated=ReplicatedService(replicas=12)))

    def here(name: str) -> int:
        return sum(task.node_id == refusing for task in cluster.wanted(name))

    with cluster:
        for spec in (as_process(a_service_spec("web", replicas=6)), a_service_spec("other", replicas=6)):
            cluster.create(spec)
            cluster.run_until(lambda name=spec.name: cluster.running(name) == 6, within_s=30)
        assert here("web") == here("other") == 2
        cluster.nodes[refusing].add_labels({ALLOW_LABEL: "devices"})
        cluster.kill_node(refusing)
        cluster.run_until(lambda: not cluster.is_ready(refusing), within_s=60)
        cluster.start_all()
        cluster.run_until(lambda: cluster.is_ready(refusing), within_s=60)
        cluster.crash(cluster.leader)
        for name in ("web", "other"):
            cluster.update(name, scaled)
            cluster.run_until(lambda name=name: cluster.running(name) == 12, within_s=60)
        assert here("web") == 0
        assert here("other") > 0
        cluster.start_all()
        cluster.run_for(10)
        cluster.check_invariants()


def test_users_draw_processes_whose_program_is_updated_like_an_image() -> None:
    specs = [a_spec("web", Random(seed), Dependencies(), Random(seed)) for seed in range(100)]
    processes = [one for one in specs if is_process(one.task_template.container_spec)]
    assert 5 < len(processes) < 50
    for spec in processes:
        check_service_spec(spec)
        changed = with_image(spec, "app:2").task_template.container_spec
        assert changed is not None
        assert (changed.image, program_of(changed)) == ("scratch", "app:2")
