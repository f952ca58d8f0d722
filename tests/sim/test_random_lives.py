"""Random lives of a cluster: whatever users do and whatever breaks, once all is whole again it is as was asked for."""

from collections.abc import Callable

import pytest
from msgspec.structs import replace

from skep.model.ids import NodeId
from skep.model.node import Availability
from skep.model.service import (
    ReplicatedService,
    Resources,
    RestartPolicy,
    ServiceMode,
    ServiceSpec,
    UpdateConfig,
    UpdateFailureAction,
    UpdateOrder,
    UpdateState,
)
from skep.model.times import SECOND_NS
from skep.sim.cluster import SimulatedCluster
from skep.sim.node import image_of
from tests.builders import a_service_spec

STEPS = 25
HOPELESS = ("broken:1", "crashing:1")
"""Images that no node can prepare, and whose containers end soon."""


class Life:
    """One cluster, and what its users and its fate do to it."""

    def __init__(self, cluster: SimulatedCluster) -> None:
        self.cluster = cluster
        self.random = cluster.random
        self.services: list[str] = []
        self.down: list[NodeId] = []
        self.crashed: list[NodeId] = []
        self.made = 0

    def live(self, steps: int) -> None:
        deeds: list[Callable[[], None]] = [
            *(self.create, self.scale, self.scale, self.update, self.update, self.remove),
            *(self.kill_container, self.kill_container, self.kill_node, self.return_node),
            *(self.drain, self.activate, self.crash_manager, self.return_manager, self.depose),
        ]
        self.create()
        for _ in range(steps):
            self.random.choice(deeds)()
            self.cluster.run_for(self.random.choice((0.01, 0.1, 1.0, 5.0)))

    def heal(self) -> None:
        """Everything that was broken is whole again."""
        for id in self.down:
            self.cluster.start_node(id)
        for id in self.crashed:
            self.cluster.start_manager(id)
        for id in self.cluster.workers:
            self.cluster.set_availability(id, Availability.ACTIVE)

    # -- users -------------------------------------------------------------------------------------------------

    def create(self) -> None:
        if len(self.services) == 4:
            return
        self.made += 1
        spec = a_service_spec(
            f"s{self.made}",
            replicas=self.random.randint(0, 8),
            is_global=self.random.random() < 0.2,
            image="app:1",
            restart=RestartPolicy(delay=self.random.choice((0, SECOND_NS))),
            update=UpdateConfig(
                parallelism=self.random.randint(0, 3),
                delay=self.random.choice((0, SECOND_NS)),
                order=self.random.choice(list(UpdateOrder)),
                failure_action=self.random.choice(list(UpdateFailureAction)),
                max_failure_ratio=self.random.choice((0.0, 0.5)),
            ),
            reserve=Resources(memory_bytes=self.random.choice((0, 64 << 20))),
        )
        self.cluster.create(spec)
        self.services.append(spec.name)

    def scale(self) -> None:
        def scaled(spec: ServiceSpec) -> ServiceSpec:
            if spec.mode.name == "global":
                return spec
            replicas = self.random.randint(0, 10)
            return replace(spec, mode=ServiceMode(replicated=ReplicatedService(replicas=replicas)))

        self._change(scaled)

    def update(self) -> None:
        def updated(spec: ServiceSpec) -> ServiceSpec:
            container = spec.task_template.container_spec
            assert container is not None
            image = self.random.choice(("app:1", "app:2", "app:3", *HOPELESS))
            template = replace(spec.task_template, container_spec=replace(container, image=image))
            return replace(spec, task_template=template)

        self._change(updated)

    def remove(self) -> None:
        if self.services:
            name = self.random.choice(self.services)
            self.services.remove(name)
            self.cluster.remove(name)

    def _change(self, change: Callable[[ServiceSpec], ServiceSpec]) -> None:
        if self.services:
            self.cluster.update(self.random.choice(self.services), change)

    # -- fate --------------------------------------------------------------------------------------------------

    def kill_container(self) -> None:
        running = [
            task
            for id, node in self.cluster.nodes.items()
            if id not in self.down
            for task in node.containers.values()
        ]
        if running:
            self.cluster.kill_container(
                self.random.choice(running), exit_code=self.random.choice((0, 1, 137))
            )

    def kill_node(self) -> None:
        if len(self.down) < len(self.cluster.workers) - 1:
            id = self.random.choice([id for id in self.cluster.workers if id not in self.down])
            self.cluster.kill_node(id, keeps_containers=self.random.random() < 0.5)
            self.down.append(id)

    def return_node(self) -> None:
        if self.down:
            self.cluster.start_node(self.down.pop(0))

    def drain(self) -> None:
        id = self.random.choice(self.cluster.workers)
        self.cluster.set_availability(id, self.random.choice((Availability.DRAIN, Availability.PAUSE)))

    def activate(self) -> None:
        self.cluster.set_availability(self.random.choice(self.cluster.workers), Availability.ACTIVE)

    def crash_manager(self) -> None:
        if len(self.crashed) < (len(self.cluster.managers) - 1) // 2:
            id = self.random.choice([id for id in self.cluster.managers if id not in self.crashed])
            self.cluster.crash(id)
            self.crashed.append(id)

    def depose(self) -> None:
        self.cluster.depose(quietly=self.random.random() < 0.7)

    def return_manager(self) -> None:
        if self.crashed:
            self.cluster.start_manager(self.crashed.pop(0))


def is_as_asked_for(cluster: SimulatedCluster, name: str) -> bool:
    """Whether the service has what its spec says; with an image that never works, as many attempts as slots."""
    service = cluster.service(name)
    assert service is not None
    wanted = cluster.wanted(name)
    slots = {task.slot or task.node_id for task in wanted}
    is_global = service.spec.mode.name == "global"
    if len(slots) != (len(cluster.workers) if is_global else service.spec.replicas):
        return False
    container = service.spec.task_template.container_spec
    assert container is not None
    if container.image in HOPELESS:
        return True
    status = service.update_status
    if status is not None and status.state in (UpdateState.PAUSED, UpdateState.ROLLBACK_PAUSED):
        hopeful = [task for task in wanted if image_of(task) not in HOPELESS]
        return cluster.running(name) >= len(hopeful)
    is_over = status is None or status.state not in (UpdateState.UPDATING, UpdateState.ROLLBACK_STARTED)
    return is_over and cluster.running(name, container.image) == len(slots) == len(wanted)


@pytest.mark.parametrize("seed", range(30))
def test_once_all_is_whole_again_everything_is_as_asked_for(seed: int) -> None:
    with SimulatedCluster(managers=3, workers=4, seed=seed) as cluster:
        for node in cluster.nodes.values():
            node.broken_images.add("broken:1")
            node.crashing_images["crashing:1"] = 0.4
        life = Life(cluster)
        life.live(STEPS)
        life.heal()
        for name in life.services:
            cluster.run_until(lambda name=name: is_as_asked_for(cluster, name), within_s=200)  # type: ignore[misc]
        gone = [f"s{number}" for number in range(1, life.made + 1) if f"s{number}" not in life.services]
        cluster.run_until(lambda: all(cluster.service(name) is None for name in gone), within_s=30)
        cluster.check_invariants(at_rest=False)
        for name in life.services:
            cluster.remove(name)
        cluster.run_until(lambda: all(cluster.service(name) is None for name in life.services), within_s=30)
        cluster.run_for(5)
        assert not any(node.containers for node in cluster.nodes.values())
        cluster.check_invariants()
