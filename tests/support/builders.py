"""Objects for tests, with defaults for all fields that a test does not set."""

import base64
import ipaddress
import json
from collections.abc import Mapping
from itertools import count

from msgspec.structs import replace

from skep.model.container import ContainerSpec
from skep.model.network import IPAMConfig, IPAMOptions, Network, NetworkSpec
from skep.model.networks.data_planes import PLANE_OPTION
from skep.model.node import (
    Availability,
    CSIInfo,
    EngineDescription,
    EnginePlugin,
    Node,
    NodeDescription,
    NodeRole,
    NodeSpec,
    NodeState,
    NodeStatus,
)
from skep.model.service import (
    EndpointSpec,
    GlobalService,
    Placement,
    PlacementPreference,
    PortConfig,
    ReplicatedService,
    ResourceRequirements,
    Resources,
    RestartPolicy,
    Service,
    ServiceMode,
    ServiceSpec,
    SpreadOver,
    TaskSpec,
    UpdateConfig,
    UpdateState,
    UpdateStatus,
)
from skep.model.task import Task, TaskState, TaskStatus
from skep.model.values.ids import NetworkId, NodeId, ServiceId, TaskId, VolumeId
from skep.model.values.meta import Driver, Version
from skep.model.values.times import timestamp
from skep.model.volume import (
    AccessMode,
    PublishState,
    PublishStatus,
    TypeMount,
    Volume,
    VolumeInfo,
    VolumeScope,
    VolumeSharing,
    VolumeSpec,
)

_numbers = count(1)


def a_service_spec(
    name: str = "web",
    *,
    replicas: int | None = 1,
    image: str = "busybox:1",
    restart: RestartPolicy | None = None,
    update: UpdateConfig | None = None,
    rollback: UpdateConfig | None = None,
    constraints: tuple[str, ...] = (),
    spread: tuple[str, ...] = (),
    max_replicas: int = 0,
    reserve: Resources | None = None,
    ports: tuple[PortConfig, ...] = (),
    is_global: bool = False,
) -> ServiceSpec:
    """Return a spec.  ``reserve``: resources of each task.  ``spread``: descriptors of placement preferences."""
    preferences = tuple(
        PlacementPreference(spread=SpreadOver(spread_descriptor=descriptor)) for descriptor in spread
    )
    return ServiceSpec(
        name=name,
        task_template=TaskSpec(
            container_spec=ContainerSpec(image=image),
            restart_policy=restart,
            resources=ResourceRequirements(reservations=reserve) if reserve else None,
            placement=Placement(constraints=constraints, preferences=preferences, max_replicas=max_replicas),
        ),
        mode=ServiceMode(global_=GlobalService())
        if is_global
        else ServiceMode(replicated=ReplicatedService(replicas=replicas)),
        update_config=update,
        rollback_config=rollback,
        endpoint_spec=EndpointSpec(ports=ports) if ports else None,
    )


def a_service(
    name: str = "web",
    *,
    id: str = "",
    version: int = 1,
    spec: ServiceSpec | None = None,
    previous: ServiceSpec | None = None,
    state: UpdateState | None = None,
    **requested: object,
) -> Service:
    """Return a service with spec ``version``.

    ``requested``: see ``a_service_spec``.  ``state``: state of its update.
    """
    return Service(
        id=ServiceId(id or name),
        version=Version(index=version),
        spec_version=Version(index=version),
        spec=spec or a_service_spec(name, **requested),  # type: ignore[arg-type]
        previous_spec=previous,
        update_status=UpdateStatus(state=state) if state else None,
    )


def a_task(
    id: str = "",
    *,
    slot: int = 1,
    node: str = "",
    state: TaskState = TaskState.RUNNING,
    desired: TaskState = TaskState.RUNNING,
    service: Service | str = "web",
    version: int = 1,
) -> Task:
    """Return a task that is younger than the tasks of earlier calls.

    ``service``: the service whose current spec it follows, or only an id.
    """
    number = next(_numbers)
    owner = service if isinstance(service, Service) else None
    return Task(
        id=TaskId(id or f"t{number:06}"),
        created_at=timestamp(number * 1_000_000_000),
        spec=owner.spec.task_template if owner else a_service_spec().task_template,
        service_id=owner.id if owner else ServiceId(str(service)),
        slot=slot,
        node_id=NodeId(node),
        status=TaskStatus(state=state),
        desired_state=desired,
        spec_version=owner.spec_version if owner else Version(index=version),
    )


def a_node(
    id: str = "n1",
    *,
    state: NodeState = NodeState.READY,
    availability: Availability = Availability.ACTIVE,
    labels: dict[str, str] | None = None,
    role: NodeRole = NodeRole.WORKER,
    has: Resources | None = None,
) -> Node:
    """Return a ready node whose hostname is its id."""
    resources = has or Resources(nano_cpus=4_000_000_000, memory_bytes=8 << 30)
    return Node(
        id=NodeId(id),
        spec=NodeSpec(labels=labels or {}, availability=availability, role=role),
        description=NodeDescription(hostname=id, resources=resources),
        status=NodeStatus(state=state, addr="127.0.0.1"),
    )


def a_docker_node(
    id: str = "d1", *, plugins: tuple[str, ...] = ("bridge", "host", "overlay"), **requested: object
) -> Node:
    """Return a ready Docker Engine at a unique address.  ``requested``: see ``a_node``."""
    node = a_node(id, **requested)  # type: ignore[arg-type]
    engine = EngineDescription(
        engine_version="20.10.24",
        plugins=tuple(EnginePlugin(type="Network", name=name) for name in plugins),
    )
    number = int("".join(filter(str.isdigit, id)) or 0)
    return replace(
        node,
        description=replace(node.description, engine=engine),
        status=replace(node.status, addr=f"192.168.100.{number}"),
    )


def an_overlay(
    name: str = "net1", *, subnet: str = "10.0.1.0/24", plane: str = "", **spec: object
) -> Network:
    """Return an overlay network.  ``subnet``: empty before the allocation.  ``plane``: its data plane."""
    network = Network(
        id=NetworkId(name),
        spec=NetworkSpec(name=name, driver_configuration=Driver(name="overlay"), **spec),  # type: ignore[arg-type]
    )
    if not subnet:
        return network
    options = {PLANE_OPTION: plane} if plane else {}
    gateway = str(ipaddress.ip_network(subnet).network_address + 1)
    return replace(
        network,
        driver_state=Driver(name="overlay", options=options),
        ipam_options=IPAMOptions(
            driver=Driver(name="default"), configs=(IPAMConfig(subnet=subnet, gateway=gateway),)
        ),
    )


def an_auth(username: str = "corp", address: str = "", **fields: str) -> str:
    """Return an ``X-Registry-Auth`` header with a user's password.  ``address``: the registry, if any."""
    known = {"username": username, "password": "s3cret", **fields}
    return base64.urlsafe_b64encode(
        json.dumps(known | ({"serveraddress": address} if address else {})).encode()
    ).decode()


def a_cluster_volume(
    name: str = "orders",
    *,
    on: Mapping[str, PublishState] | None = None,
    scope: VolumeScope = VolumeScope.SINGLE,
    sharing: VolumeSharing = VolumeSharing.NONE,
    group: str = "",
) -> Volume:
    """Return a volume that its driver has created.  ``on``: its state on each node that has an entry."""
    return Volume(
        id=VolumeId(f"id-{name}"),
        spec=VolumeSpec(
            name=name,
            group=group,
            driver=Driver(name="disks"),
            access_mode=AccessMode(scope=scope, sharing=sharing, mount_volume=TypeMount()),
        ),
        info=VolumeInfo(volume_id=f"disk-{name}"),
        publish_status=tuple(
            PublishStatus(node_id=NodeId(id), state=state, driver_node_id=f"disks-{id}")
            for id, state in sorted((on or {}).items())
        ),
    )


def with_disks(node: Node) -> Node:
    """Return ``node`` with the driver of ``a_cluster_volume``."""
    info = CSIInfo(plugin_name="disks", node_id=f"disks-{node.id}")
    return replace(node, description=replace(node.description, csi_info=(info,)))
