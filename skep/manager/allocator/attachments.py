"""A task's attachments to its networks, and the virtual addresses of services.

Networks of the node itself (``host``, ``bridge``, ``none``) need no allocation.  On an overlay network a task gets its
own address.  Until then it stays NEW, with the reason in its status, because it must not run without a network of its
spec.  A task that publishes ports in ingress mode is also attached to the ingress network, before all others.  The
ingress network is the only one on both data planes.  Each data plane serves the tasks of its own nodes there.

A service keeps a virtual address per overlay network and IP version as long as it has the network.

Source: swarmkit, manager/allocator/network.go (taskCreateNetworkAttachments),
cnmallocator/networkallocator.go (AllocateService).
"""

from collections.abc import Callable, Collection, Sequence

import msgspec

from skep.manager.allocator.addresses import NoAddress, has_ipv6
from skep.manager.allocator.subnets import has_addresses, is_allocated
from skep.model.door.routes import has_routes
from skep.model.network import Network
from skep.model.networks.data_planes import is_overlay
from skep.model.options.dependencies import WAITS_FOR
from skep.model.service import EndpointVirtualIP, NetworkAttachmentConfig, Service, ServiceSpec
from skep.model.task import NetworkAttachment, Task, TaskState
from skep.model.values.ids import NetworkId
from skep.store.interface import View
from skep.store.kinds import spec_of

DNS_ROUND_ROBIN = "dnsrr"


class AttachedTask(msgspec.Struct, frozen=True):
    """All networks of the task are ready."""

    attachments: tuple[NetworkAttachment, ...] = ()


class NotAttached(msgspec.Struct, frozen=True):
    """The task has to wait for a network or for an address on it.  The task shows ``reason``."""

    reason: str
    network_id: NetworkId


class AttachableNetworks(msgspec.Struct, frozen=True, kw_only=True):
    """The data about the cluster's networks that is needed to attach a task."""

    find: Callable[[NetworkId], Network | None]
    ingress: Network | None = None
    """The network of published ports, which may not be allocated yet, or None."""
    door: Network | None = None
    """The network of HTTP routes, which may not be allocated yet, or None."""
    unreadable: Collection[NetworkId] = ()
    """Networks that cannot be read.  Any of them may be the network of published ports, or of routes."""
    failure: Callable[[NetworkId], str] = lambda _: "not yet"
    """Returns the reason why a network is not allocated."""

    def missing_for(self, spec: ServiceSpec) -> NetworkId | None:
        """Return an unreadable network that tasks of ``spec`` may need although the spec does not name it, or None."""
        needs_ingress = self.ingress is None and spec.publishes_in_ingress
        needs_door = self.door is None and has_routes(spec.labels)
        return min(self.unreadable, default=None) if needs_ingress or needs_door else None


def attachments_for(
    spec: ServiceSpec,
    networks: AttachableNetworks,
    allocate: Callable[[Network, Sequence[str]], tuple[str, ...]],
    requested: Sequence[NetworkAttachment] = (),
) -> AttachedTask | NotAttached:
    """Return the attachments of a task with ``spec``, or the reason why it has to wait.

    Args:
        allocate: Allocates addresses of a network, one of each IP version.  The second argument has the requested
            addresses.  Raises NoAddress.
        requested: Attachments that name addresses (``docker run --ip``, ``--ip6``).
    """
    if (missing := networks.missing_for(spec)) is not None:
        return NotAttached(f"{WAITS_FOR}network {missing}, which is unreadable on the leader", missing)
    attachments = []
    addresses = {one.network.id: one.addresses for one in requested if one.network}
    for wanted in wanted_networks(spec, networks.ingress, networks.door):
        id = NetworkId(wanted.target)
        network = networks.find(id)
        if network is None:
            return NotAttached(f"network {id} not found", id)
        if not is_overlay(network):
            attachments.append(NetworkAttachment(network=network, aliases=wanted.aliases))
            continue
        if not has_addresses(network):
            name = network.spec.name or network.id
            return NotAttached(f"network {name} is not allocated: {networks.failure(network.id)}", id)
        try:
            given = allocate(network, addresses.get(network.id, ()))
        except NoAddress as error:
            return NotAttached(str(error), id)
        attachments.append(NetworkAttachment(network=network, addresses=given, aliases=wanted.aliases))
    return AttachedTask(tuple(attachments))


def wanted_networks(
    spec: ServiceSpec, ingress: Network | None, door: Network | None = None
) -> list[NetworkAttachmentConfig]:
    """Return the networks of the task template, or else the service's own list, which is the older form.

    Services with published ports also have the ingress network, and services with routes the front door's.
    """
    wanted = spec.task_template.networks or spec.networks
    found = list(wanted)
    if ingress is not None and spec.publishes_in_ingress:
        found.insert(0, NetworkAttachmentConfig(target=ingress.id))
    if door is not None and has_routes(spec.labels) and all(one.target != door.id for one in wanted):
        # The last one: a container's default route leads over its first network.
        found.append(NetworkAttachmentConfig(target=door.id))
    return found


def is_new(task: Task) -> bool:
    """Return whether the task waits for the allocator."""
    return task.status.state is TaskState.NEW and task.is_wanted


def overlays_of(view: View, task: Task, networks: AttachableNetworks) -> list[Network]:
    """Return the networks on which a new task will get an address."""
    wanted = wanted_networks(spec_or_template(view, task), networks.ingress, networks.door)
    found = (networks.find(NetworkId(one.target)) for one in wanted)
    return [network for network in found if network and is_overlay(network) and is_allocated(network)]


def spec_or_template(view: View, task: Task) -> ServiceSpec:
    """Return the spec from which the task was created, or the task's own template if that spec was deleted."""
    return spec_of(view, task) or ServiceSpec(task_template=task.spec)


def virtual_ips_for(
    service: Service, networks: AttachableNetworks, allocate: Callable[[Network, int], str]
) -> tuple[EndpointVirtualIP, ...]:
    """Return the virtual addresses that ``service`` should have: its existing ones, and new ones where they are
    missing.

    A network without an allocation is skipped until it has one.  An address of a network that cannot be read is kept.
    The IPv4 address of a network comes first, because engines read no other.

    Args:
        allocate: Allocates an address of a network and an IP version.  Raises NoAddress.
    """
    spec = service.spec.endpoint_spec
    if spec is not None and spec.mode == DNS_ROUND_ROBIN:
        return ()
    present = {(one.network_id, ":" in one.addr): one for one in service.endpoint.virtual_ips}
    virtual_ips = [one for one in service.endpoint.virtual_ips if one.network_id in networks.unreadable]
    for wanted in wanted_networks(service.spec, networks.ingress, networks.door):
        network = networks.find(NetworkId(wanted.target))
        if network is None or not is_overlay(network) or not has_addresses(network):
            continue
        for version in (4, 6) if has_ipv6(network) else (4,):
            kept = present.get((network.id, version == 6))
            virtual_ips.append(
                kept or EndpointVirtualIP(network_id=network.id, addr=allocate(network, version))
            )
    return tuple(virtual_ips)
