"""What tasks need and hold is one list: every user of it agrees with the scheduler's filters."""

from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.manager.scheduler.accounting import Accounting
from skep.manager.scheduler.filters import filters_for
from skep.manager.scheduler.requirements import requirements_of
from skep.model.container import ContainerSpec, Mount
from skep.model.ids import TaskId
from skep.model.needs import holds_of, host_ports, may_block, needs_of
from skep.model.service import (
    DiscreteResource,
    GenericResource,
    PortConfig,
    PublishMode,
    Resources,
    Service,
    ServiceSpec,
)
from skep.model.task import Task, VolumeAttachment
from skep.model.volume import PublishState, PublishStatus, Volume, VolumeScope, VolumeSharing
from tests.support.builders import a_cluster_volume, a_node, a_service, a_service_spec, a_task, with_disks

GPU = GenericResource(discrete_resource_spec=DiscreteResource(kind="gpu", value=1))
NODE = with_disks(a_node("n1", has=Resources(nano_cpus=2, memory_bytes=2, generic_resources=(GPU,))))
SOURCE = "orders"


def a_spec(
    cpus: int = 0, memory: int = 0, gpu: bool = False, port: int = 0, limit: int = 0, mount: str = ""
) -> ServiceSpec:
    """``mount``: r or w, of the cluster volume."""
    reserve = Resources(nano_cpus=cpus, memory_bytes=memory, generic_resources=(GPU,) if gpu else ())
    published = PortConfig(target_port=80, published_port=port, publish_mode=PublishMode.HOST)
    spec = a_service_spec(reserve=reserve, ports=(published,) if port else (), max_replicas=limit)
    mounts = (Mount(type="cluster", source=SOURCE, target="/d", read_only=mount == "r"),) if mount else ()
    container = ContainerSpec(image="app", mounts=mounts)
    return replace(spec, task_template=replace(spec.task_template, container_spec=container))


SPECS = st.builds(
    a_spec,
    cpus=st.integers(0, 2),
    memory=st.integers(0, 2),
    gpu=st.booleans(),
    port=st.sampled_from([0, 80, 81]),
    limit=st.integers(0, 1),
    mount=st.sampled_from(["", "r", "w"]),
)
VOLUMES = st.builds(
    a_cluster_volume,
    st.just(SOURCE),
    scope=st.sampled_from(VolumeScope),
    sharing=st.sampled_from(VolumeSharing),
)


def a_running_task(service: Service, volume: Volume, id: str = "old", node: str = "n1") -> Task:
    """With what the scheduler gave it."""
    needs = needs_of(service.spec)
    attachments = [
        VolumeAttachment(id=volume.id, source=one.source, target=one.target) for one in needs.cluster_volumes
    ]
    return replace(
        a_task(id, node=node, service=service),
        generic_resources=needs.generic,
        volumes=tuple(attachments),
    )


def is_refused(spec: ServiceSpec, accounting: Accounting) -> bool:
    """Whether every node refuses a task of ``spec``."""
    service = a_service(spec=spec, version=2)
    requirements = requirements_of(a_task(service=service), spec)
    copies = accounting.copies(service.id)
    return not any(
        all(one.passes(requirements, account, copies[account.node.id]) for one in filters_for(requirements))
        for account in accounting.accounts.values()
    )


@given(old=SPECS, new=SPECS, volume=VOLUMES)
@example(old=a_spec(mount="w"), new=a_spec(mount="w"), volume=a_cluster_volume(SOURCE))
@example(old=a_spec(), new=a_spec(limit=1), volume=a_cluster_volume(SOURCE))
def test_a_task_whose_end_lets_a_refused_one_in_is_known_to_be_in_its_way(
    old: ServiceSpec, new: ServiceSpec, volume: Volume
) -> None:
    """Every filter that depends on the tasks of a node: an update would wait for its own old task for ever."""
    service = a_service(spec=old)
    task = a_running_task(service, volume)
    if needs_of(old).cluster_volumes:
        entry = PublishStatus(node_id=NODE.id, state=PublishState.PUBLISHED)
        volume = replace(volume, publish_status=(entry,))
    accounting = Accounting()
    accounting.set_node(NODE)
    accounting.update_volume(volume.id, volume)
    held = holds_of(task, host_ports(old))
    accounting.reserve(task.id, task.node_id, held)
    was_refused = is_refused(new, accounting)
    accounting.remove(TaskId("old"))
    if was_refused and not is_refused(new, accounting):
        assert may_block(held, needs_of(new), {volume.id: volume}.get)
    if may_block(held, needs_of(new), {volume.id: volume}.get):
        assert held.is_exclusive or needs_of(new).max_replicas
