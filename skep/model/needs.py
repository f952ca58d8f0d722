"""The needs of a service's tasks and the holdings of a task: the one list of both.

* ``needs_of(spec)``: the objects, images and node resources without which a task of the spec cannot start.
* ``holds_of(task)``: the part of its node, and of its volumes, that a task has from its assignment until its end.
* ``may_block``: whether the end of a task with certain holdings may let a node take a task with certain needs.

Every decision whether something is needed or free uses them: filters, updates, preemption, the dry run, the removal of
lost nodes, references in the store, image collection, and removals.  Each of them must consider a resource that is
added here: ``tests/unit/manager/test_needs.py`` lists resources by users, and fails on a gap.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Final, TypeAlias

import msgspec

from skep.model.container import ConfigReference, ContainerSpec, SecretReference
from skep.model.ids import ServiceId, VolumeId
from skep.model.service import GenericResource, Placement, PublishMode, Resources, ServiceSpec, TaskSpec
from skep.model.slot_volumes import local_volumes
from skep.model.task import Task, VolumeAttachment
from skep.model.volume import GROUP_PREFIX, Volume, VolumeScope, VolumeSharing

HostPort: TypeAlias = tuple[str, int]
"""Protocol and port number on a node."""


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
    """The needs of each task of a spec, outside of its own spec."""

    images: tuple[str, ...] = ()
    """Images of the container and of its image mounts, as spelled in the spec."""
    secrets: tuple[SecretReference, ...] = ()
    configs: tuple[ConfigReference, ...] = ()
    networks: tuple[str, ...] = ()
    """Ids of networks, on each of which the task needs an address."""
    host_ports: tuple[HostPort, ...] = ()
    nano_cpus: int = 0
    memory_bytes: int = 0
    generic: tuple[GenericResource, ...] = ()
    max_replicas: int = 0
    """Tasks of the service that its node may have, or 0 for any number."""
    cluster_volumes: tuple[ClusterMount, ...] = ()
    local_volumes: tuple[str, ...] = ()
    """Volumes whose data stays on its node.  Names may contain placeholders."""


class Usage(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The holdings of a task: the same for all tasks of one version of a service, except ``generic`` and
    ``volumes``."""

    service_id: ServiceId
    nano_cpus: int
    memory_bytes: int
    generic: tuple[GenericResource, ...]
    host_ports: tuple[HostPort, ...]
    is_active: bool
    """Whether it counts as a task of its service on this node.  A task that is being stopped does not."""
    volumes: tuple[VolumeUse, ...] = ()
    """Its cluster volumes."""
    is_unknown: bool = False
    """Whether its spec cannot be read, so that it may hold any ports and resources."""

    @property
    def is_exclusive(self) -> bool:
        """Return whether a task with this need may block other tasks, whatever they need."""
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
    """Return the images that a task of ``template`` needs, as it spells them."""
    container = template.container_spec
    if container is None:
        return ()
    if not container.mounts:
        return (container.image,) if container.image else ()
    mounted = (mount.source for mount in container.mounts if mount.type == "image")
    return tuple(dict.fromkeys(filter(None, (container.image, *mounted))))


def holds_of(task: Task, ports: tuple[HostPort, ...]) -> Usage:
    """Return the holdings of ``task``.  ``ports`` are the host ports of the spec that it was made from."""
    reservations = reservations_of(task.spec)
    return Usage(
        service_id=task.service_id,
        nano_cpus=reservations.nano_cpus,
        memory_bytes=reservations.memory_bytes,
        generic=task.generic_resources,
        host_ports=ports,
        is_active=task.is_wanted,
        volumes=uses_of(task) if task.volumes else (),
    )


def may_block(held: Usage, needs: Needs, volume: Callable[[VolumeId], Volume | None]) -> bool:
    """Return whether the end of a task with ``held`` may let a node take a task with ``needs`` that no node takes
    now."""
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
    """Return whether a task with ``mount`` can never share ``volume`` with another task, which may be read-only."""
    match volume.spec.access_mode.sharing:
        case VolumeSharing.NONE:
            return True
        case VolumeSharing.ONE_WRITER:
            return not read_only and not mount.read_only
        case _:
            return False


def _excludes(use: VolumeUse, mounts: Iterable[ClusterMount], volume: Volume | None) -> bool:
    """Return whether ``use`` may keep a task from volumes that it mounts.  A volume with scope single stays on its
    node."""
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


def kind_and_amount(resource: GenericResource) -> tuple[str, int]:
    """Return the kind of the resource, and the amount.

    A negative amount, which a node may offer and an earlier version stored, counts as 0.  It would increase the free
    amount.
    """
    if (discrete := resource.discrete_resource_spec) is not None:
        return discrete.kind, max(0, discrete.value)
    if (named := resource.named_resource_spec) is not None:
        return named.kind, 1
    return "", 0


def host_ports(spec: ServiceSpec | None) -> tuple[HostPort, ...]:
    """Return the ports that each task opens on its node with a number chosen by the user."""
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
    """Return the sources of mounts that may mean the volume."""
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
