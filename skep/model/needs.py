"""Lists everything that a service's tasks need and that a task holds.

* ``needs_of(spec)``: the objects, images and node resources without which a task of the spec cannot start.
* ``holds_of(task)``: the resources of its node, and the volumes, that a task occupies from its assignment to its end.
* ``may_block``: whether a task that waits may become placeable when another task ends and releases its holdings.

All code that asks whether something is needed or free uses these functions: filters, updates, preemption, the dry run,
the removal of lost nodes, references in the store, image collection, and removals.  A resource that is added here must
be considered in each of these places.  ``tests/unit/manager/test_needs.py`` has a table of resources and places, and
fails on a gap.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, TypeAlias

import msgspec
from msgspec.structs import replace

from skep.model.container import ConfigReference, ContainerSpec, SecretReference
from skep.model.node import Node
from skep.model.options.labels import RESERVE_CPUS, RESERVE_MEMORY, system_reserve
from skep.model.options.secret_env import PLUGIN as SECRET_ENV_PLUGIN
from skep.model.options.secret_env import SECRET_ENV_LABEL
from skep.model.options.slot_volumes import local_volumes
from skep.model.service import GenericResource, Placement, PublishMode, Resources, ServiceSpec, TaskSpec
from skep.model.task import Task, VolumeAttachment
from skep.model.values.ids import ServiceId, VolumeId
from skep.model.volume import GROUP_PREFIX, Volume, VolumeScope, VolumeSharing

HostPort: TypeAlias = tuple[str, int]
"""Protocol and port number on a node."""
Plugin: TypeAlias = tuple[str, str]
"""Type (Volume, Network, Log) and name."""


class ClusterMount(msgspec.Struct, frozen=True):
    """A mount of type ``cluster``.  ``source`` is a volume's name, or ``group:`` and the name of a group."""

    source: str
    target: str
    read_only: bool


class VolumeUse(msgspec.Struct, frozen=True):
    """A volume that a task uses."""

    volume_id: VolumeId
    read_only: bool


class Needs(msgspec.Struct, frozen=True, kw_only=True):
    """The objects, images and node resources that each task of a service needs in order to start."""

    images: tuple[str, ...] = ()
    """Images of the container and of its image mounts, as spelled in the spec."""
    secrets: tuple[SecretReference, ...] = ()
    configs: tuple[ConfigReference, ...] = ()
    networks: tuple[str, ...] = ()
    """Ids of the networks on which the task needs an address."""
    host_ports: tuple[HostPort, ...] = ()
    nano_cpus: int = 0
    memory_bytes: int = 0
    generic: tuple[GenericResource, ...] = ()
    max_replicas: int = 0
    """Largest number of the service's tasks on one node, or 0 for no limit."""
    cluster_volumes: tuple[ClusterMount, ...] = ()
    local_volumes: tuple[str, ...] = ()
    """Names of the volumes whose data stays on the task's node.  They may contain placeholders."""


class Holdings(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The resources that a task holds.  All tasks of one version of a service hold the same, except for ``generic`` and
    ``volumes``.
    """

    service_id: ServiceId
    nano_cpus: int
    memory_bytes: int
    generic: tuple[GenericResource, ...]
    host_ports: tuple[HostPort, ...]
    is_active: bool
    """Whether it counts towards the service's limit of tasks per node.  A task that is being stopped does not."""
    volumes: tuple[VolumeUse, ...] = ()
    """The cluster volumes that it uses."""
    is_unknown: bool = False
    """Whether its spec cannot be read.  It may then hold any ports and resources."""

    @property
    def is_exclusive(self) -> bool:
        """Return whether a task with these holdings may block any other task, whatever that needs."""
        return bool(self.nano_cpus or self.memory_bytes or self.generic or self.host_ports or self.volumes)


def needs_of(spec: ServiceSpec) -> Needs:
    """Return the needs of each task of a service with ``spec``."""
    template = spec.task_template
    container = template.container_spec or ContainerSpec()
    reservations = reservations_of(template)
    return Needs(
        images=images_of(spec.task_template),
        secrets=container.secrets,
        configs=container.configs,
        networks=tuple(dict.fromkeys(one.target for one in (*template.networks, *spec.networks))),
        host_ports=host_ports(spec),
        nano_cpus=reservations.nano_cpus,
        memory_bytes=reservations.memory_bytes,
        generic=reservations.generic_resources,
        max_replicas=(template.placement or Placement()).max_replicas,
        cluster_volumes=cluster_mounts(template),
        local_volumes=local_volumes(template),
    )


def references_of(spec: ServiceSpec) -> tuple[tuple[str, str], ...]:
    """Return kind and id of the objects of the store that tasks of ``spec`` need: secrets, configs, networks."""
    template, container = spec.task_template, spec.task_template.container_spec
    found: list[tuple[str, str]] = []
    if container is not None:
        found += [("secret", one.secret_id) for one in container.secrets]
        found += [("config", one.config_id) for one in container.configs]
    return (*found, *(("network", one.target) for one in (*template.networks, *spec.networks)))


def images_of(template: TaskSpec) -> tuple[str, ...]:
    """Return the images that a task of ``template`` needs, spelled as in the template."""
    container = template.container_spec
    if container is None:
        return ()
    if not container.mounts:
        return (container.image,) if container.image else ()
    mounted = (mount.source for mount in container.mounts if mount.type == "image")
    return tuple(dict.fromkeys(filter(None, (container.image, *mounted))))


def holds_of(task: Task, ports: tuple[HostPort, ...]) -> Holdings:
    """Return the holdings of ``task``.  ``ports``: the host ports of the spec from which it was created."""
    reservations = reservations_of(task.spec)
    return Holdings(
        service_id=task.service_id,
        nano_cpus=reservations.nano_cpus,
        memory_bytes=reservations.memory_bytes,
        generic=task.generic_resources,
        host_ports=ports,
        is_active=task.is_wanted,
        volumes=uses_of(task) if task.volumes else (),
    )


def may_block(held: Holdings, needs: Needs, volume: Callable[[VolumeId], Volume | None]) -> bool:
    """Return whether a task that holds ``held`` may be the reason why no node takes a task with ``needs``."""
    kinds = {kind_and_amount(one)[0] for one in held.generic}
    return bool(
        (held.nano_cpus and needs.nano_cpus)
        or (held.memory_bytes and needs.memory_bytes)
        or any(kind_and_amount(one)[0] in kinds for one in needs.generic)
        or not set(held.host_ports).isdisjoint(needs.host_ports)
        or (held.is_active and needs.max_replicas)
        or any(_excludes(use, needs.cluster_volumes, volume(use.volume_id)) for use in held.volumes)
    )


def cannot_share(volume: Volume, mount: ClusterMount, *, read_only: bool = False) -> bool:
    """Return whether a task with ``mount`` cannot share ``volume`` with a task that mounts it.

    ``read_only``: whether that other task mounts it read-only.
    """
    match volume.spec.access_mode.sharing:
        case VolumeSharing.NONE:
            return True
        case VolumeSharing.ONE_WRITER:
            return not read_only and not mount.read_only
        case _:
            return False


def _excludes(use: VolumeUse, mounts: Iterable[ClusterMount], volume: Volume | None) -> bool:
    """Return whether ``use`` of a volume may prevent another task with ``mounts`` from starting.  A volume with scope
    single stays on one node.
    """
    if volume is None:
        return False
    sources, is_single = sources_of(volume), volume.spec.access_mode.scope is VolumeScope.SINGLE
    return any(
        one.source in sources and (is_single or cannot_share(volume, one, read_only=use.read_only))
        for one in mounts
    )


# -- parts of a spec -----------------------------------------------------------------------------------------------


CPU_NANO: Final = 1_000_000_000
"""One processor in nano CPUs."""


def reservations_of(spec: TaskSpec) -> Resources:
    """Return the reservations of a task with this spec."""
    resources = spec.resources
    return (resources.reservations if resources else None) or Resources()


def capacity_of(node: Node) -> Resources:
    """Return the resources that tasks can reserve on the node: its own without what its labels keep for the system."""
    has, labels = node.description.resources, node.spec.labels
    if RESERVE_CPUS not in labels and RESERVE_MEMORY not in labels:
        return has  # the usual case, for each node that is compared
    nano_cpus, memory_bytes = system_reserve(labels)
    return replace(
        has,
        nano_cpus=max(0, has.nano_cpus - nano_cpus),
        memory_bytes=max(0, has.memory_bytes - memory_bytes),
    )


def kept_words(node: Node, label: str) -> str:
    """Return a clause about the resources that ``label``, one of ``skep.reserve.*``, keeps for the node's system.

    Empty if it keeps none.
    """
    if label not in node.spec.labels:
        return ""
    nano_cpus, memory_bytes = system_reserve(node.spec.labels)
    has = node.description.resources
    if label == RESERVE_CPUS:
        kept = f"{min(nano_cpus, has.nano_cpus) / CPU_NANO:g}" if nano_cpus else ""
    else:
        kept = f"{min(memory_bytes, has.memory_bytes) // (1 << 20)} MiB" if memory_bytes else ""
    return f" ({label} keeps {kept} for the system)" if kept else ""


def kind_and_amount(resource: GenericResource) -> tuple[str, int]:
    """Return the kind of the resource, and the amount.

    A negative amount counts as 0, because it would increase the free amount.  A node may report one, and an earlier
    version stored it.
    """
    if (discrete := resource.discrete_resource_spec) is not None:
        return discrete.kind, max(0, discrete.value)
    if (named := resource.named_resource_spec) is not None:
        return named.kind, 1
    return "", 0


def host_ports(spec: ServiceSpec | None) -> tuple[HostPort, ...]:
    """Return the ports with a fixed number that each task opens on its node."""
    if spec is None or spec.endpoint_spec is None:
        return ()
    return tuple(
        (port.protocol, port.published_port)
        for port in spec.endpoint_spec.ports
        if port.publish_mode is PublishMode.HOST and port.published_port
    )


def cluster_mounts(spec: TaskSpec) -> tuple[ClusterMount, ...]:
    """Return the mounts of cluster volumes in a container."""
    mounts = spec.container_spec.mounts if spec.container_spec is not None else ()
    if not mounts:
        return ()
    return tuple(
        ClusterMount(mount.source, mount.target, mount.read_only)
        for mount in mounts
        if mount.type == "cluster"
    )


def sources_of(volume: Volume) -> Sequence[str]:
    """Return the texts by which a mount's ``source`` may refer to the volume."""
    name, group = volume.spec.name, volume.spec.group
    return [
        *((name,) if not name.startswith(GROUP_PREFIX) else ()),
        *((GROUP_PREFIX + group,) if group else ()),
    ]


def uses_of(task: Task) -> tuple[VolumeUse, ...]:
    """Return the volumes that a task uses.  A volume is read-only if all its mounts are."""
    return volume_uses(task.volumes, cluster_mounts(task.spec))


def volume_uses(given: Iterable[VolumeAttachment], mounts: Iterable[ClusterMount]) -> tuple[VolumeUse, ...]:
    """Return the volumes that a task with these volumes and mounts uses."""
    readings = {(one.source, one.target): one.read_only for one in mounts}
    reading: dict[VolumeId, bool] = {}
    for one in given:
        id = VolumeId(one.id)
        reading[id] = reading.get(id, True) and readings.get((one.source, one.target), False)
    return tuple(VolumeUse(id, read_only) for id, read_only in reading.items())


def plugins_of(task: Task) -> tuple[Plugin, ...]:
    """Return the plugins that a node needs for ``task``."""
    return tuple(_plugins(task))


def _plugins(task: Task) -> Iterator[Plugin]:
    container = task.spec.container_spec
    if container is not None and SECRET_ENV_LABEL in container.labels:
        yield SECRET_ENV_PLUGIN
    for mount in container.mounts if container else ():
        driver = mount.volume_options.driver_config if mount.volume_options else None
        if mount.type == "volume" and driver is not None and driver.name not in ("", "local"):
            yield "Volume", driver.name
    for attachment in task.networks_attachments:
        network = attachment.network
        if network is not None and network.driver_state.name and not network.spec.ingress:
            yield "Network", network.driver_state.name
    log_driver = task.spec.log_driver
    if log_driver is not None and log_driver.name not in ("", "none"):
        yield "Log", log_driver.name


def has_plugin(node: Node, plugin: Plugin) -> bool:
    """Return whether ``node`` lists ``plugin``."""
    type, name = plugin
    names = [one.name for one in node.description.engine.plugins if one.type == type]
    if type == "Log" and not names:
        # An older engine does not list its log drivers.
        return True
    return name in names or f"{name}:latest" in names
