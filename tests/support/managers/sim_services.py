"""Helpers for tests of services in a simulated cluster."""

from msgspec.structs import replace

from sim.cluster import SimulatedCluster
from skep.model.service import ReplicatedService, ServiceMode, ServiceSpec, UpdateState


def with_replicas(spec: ServiceSpec, replicas: int) -> ServiceSpec:
    return replace(spec, mode=ServiceMode(replicated=ReplicatedService(replicas=replicas)))


def with_image(spec: ServiceSpec, image: str) -> ServiceSpec:
    template = spec.task_template
    assert template.container_spec is not None
    container = replace(template.container_spec, image=image)
    return replace(spec, task_template=replace(template, container_spec=container))


def state_of(cluster: SimulatedCluster, name: str = "web") -> UpdateState | None:
    service = cluster.service(name)
    return service.update_status.state if service is not None and service.update_status else None
