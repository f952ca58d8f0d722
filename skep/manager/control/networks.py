"""Operations on cluster networks.

Source: swarmkit, manager/controlapi/network.go; moby 20.10, daemon/cluster/networks.go.
"""

from collections.abc import Sequence

from msgspec.structs import replace

from skep.api.formats.networks import PREDEFINED_LABEL
from skep.errors import AlreadyExists, FailedPrecondition, InvalidArgument, SubnetTaken, Unavailable
from skep.manager.control.quotas import check_network_quota
from skep.manager.control.validation.network_specs import (
    SUBNETS_MAX,
    check_network_spec,
    check_subnets,
)
from skep.manager.failover.records import addresses_in
from skep.manager.services.job_runs import runs_with
from skep.manager.services.routes import exposed
from skep.model.door.settings import door_network, is_door
from skep.model.network import (
    OVERLAP_LABEL,
    IPAMConfig,
    IPAMOptions,
    Network,
    NetworkSpec,
    is_ingress,
    subnet_of,
)
from skep.model.networks.addresses import parsed
from skep.model.networks.data_planes import is_overlay
from skep.model.networks.overlays import vxlan_ids
from skep.model.networks.routes import Subnet, overlap, route_overlaps
from skep.model.node import Node
from skep.model.service import PublishMode, Service
from skep.model.task import Task
from skep.model.values.ids import IdSource, NetworkId
from skep.model.values.meta import Driver
from skep.model.values.stacks import STACK_LABEL
from skep.model.values.times import Timestamp
from skep.store.interface import InUse, Transaction, View

_NODE_LOCAL = ("bridge", "host")


def create_network(tx: Transaction, spec: NetworkSpec, *, new_id: IdSource, now: Timestamp) -> Network:
    """Create a network that services can be attached to.

    Raises:
        InvalidArgument, PermissionDenied, Unimplemented: The spec cannot work, or its stack's quota does not allow it.
        AlreadyExists: The name is taken, or an ingress network already exists.
        FailedPrecondition: Its subnet or VXLAN id belongs to another network, or a machine has that subnet.
    """
    check_network_spec(spec)
    if spec.ingress:
        present = known_ingress_network(tx)
        if present is not None:
            raise AlreadyExists(f"ingress network ({present.id}) is already present")
        tx.rely_on_all(
            Network
        )  # the existing ingress network may have any name, so all networks are compared
    check_network_quota(tx, spec)
    network = Network(id=NetworkId(new_id()), created_at=now, spec=spec)
    if is_overlay(network):
        _check_vxlan_ids(tx, spec)
        _check_room(tx, network, spec.ipam_options.configs if spec.ipam_options is not None else ())
    return tx.put(network)


def add_subnets(tx: Transaction, id: NetworkId, configs: Sequence[IPAMConfig]) -> Network:
    """Add subnets to a network, which keeps its own.  A config without a subnet gets one from the default pools.

    Raises:
        NotFound: The network does not exist.
        InvalidArgument: A subnet is invalid or overlaps another.
        FailedPrecondition: The network has no subnets, or for the reasons of ``create_network``.
    """
    network = tx.get(Network, id)
    if not is_overlay(network):
        raise FailedPrecondition(f"network {network.spec.name} has no subnets that the cluster manages")
    options = network.spec.ipam_options or IPAMOptions(driver=Driver(name="default"))
    present = options.configs
    if not any(config.subnet and ":" not in config.subnet for config in present):
        # Add the allocated subnets to the spec, because the spec must list all subnets once it lists any.
        present = present if any(not config.subnet for config in present) else (IPAMConfig(), *present)
    given = network.ipam_options.configs if network.ipam_options is not None else ()
    new = tuple(config for config in configs if config.subnet)
    check_subnets(new)
    if any(":" in config.subnet for config in new) and not network.spec.ipv6_enabled:
        raise InvalidArgument(f"network {network.spec.name} was created without IPv6")
    if any(not config.subnet and config != IPAMConfig() for config in configs):
        raise InvalidArgument("every ip-range or gateway must have a corresponding subnet")
    if len(present) + len(configs) > SUBNETS_MAX:
        raise InvalidArgument(f"ipam configuration: more than {SUBNETS_MAX} subnets")
    check_subnets((*(config for config in given if subnet_of(config) not in map(subnet_of, new)), *new))
    new = tuple(config for config in new if subnet_of(config) not in [subnet_of(one) for one in given])
    blank = tuple(config for config in configs if not config.subnet)
    if not new and not blank:
        return network
    _check_room(tx, network, new)
    extended = replace(options, configs=(*present, *new, *blank))
    spec = replace(network.spec, ipam_options=extended)
    check_network_quota(tx, spec, network)
    return tx.put(replace(network, spec=spec))


def remove_network(tx: Transaction, id: NetworkId) -> None:
    """Remove a network that no service uses.

    Raises:
        NotFound: The network was removed.
        FailedPrecondition: A service uses the network, or the cluster itself does.
    """
    network = tx.get(Network, id)
    if network.spec.labels.get(PREDEFINED_LABEL) == "true":
        raise FailedPrecondition(
            f"network {id} ({network.spec.name}) is a swarm predefined network and cannot be removed"
        )
    if is_ingress(network):
        _check_ingress_unused(tx)
    if is_door(network.spec.labels):
        _check_door_unused(tx, id)
    for job in runs_with(tx, "network", id):
        raise FailedPrecondition(f"network {id} is in use by service {job.id} ({job.spec.name})")
    try:
        tx.delete(Network, id)
    except InUse as error:
        kind, user = error.users[0]
        raise FailedPrecondition(f"network {id} is in use by {kind} {user}{_names(tx, error)}") from error


def first_networks(*, new_id: IdSource, now: Timestamp, has_ipv6: bool = False) -> tuple[Network, ...]:
    """Return the networks of a new cluster: ingress, and the nodes' own bridge and host.

    Args:
        has_ipv6: Whether the nodes reach each other by IPv6.  Clients then use IPv6 as well, and ingress needs it to
            preserve their addresses.
    """
    ingress = NetworkSpec(
        name="ingress",
        driver_configuration=Driver(name="overlay"),
        ingress=True,
        ipv6_enabled=has_ipv6,
        ipam_options=IPAMOptions(driver=Driver(name="default")),
    )
    local = (
        NetworkSpec(name=name, labels={PREDEFINED_LABEL: "true"}, driver_configuration=Driver(name=name))
        for name in _NODE_LOCAL
    )
    return tuple(Network(id=NetworkId(new_id()), created_at=now, spec=spec) for spec in (ingress, *local))


def ingress_network(view: View) -> Network | None:
    """Return the cluster's ingress network, if it has one."""
    return next(filter(is_ingress, view.find(Network)), None)


def known_ingress_network(view: View) -> Network | None:
    """Return the ingress network, or None if the cluster certainly has none.  Raises: Unavailable: an unreadable
    network may be the ingress network.
    """
    network = ingress_network(view)
    if network is None and (unreadable := view.unreadable(Network)):
        raise Unavailable(f"network {min(unreadable)} cannot be read: it may be the ingress network")
    return network


def _check_ingress_unused(tx: Transaction) -> None:
    for service in tx.find(Service):
        endpoint = service.spec.endpoint_spec
        ports = endpoint.ports if endpoint is not None and service.removed_at is None else ()
        if any(port.publish_mode is PublishMode.INGRESS for port in ports):
            raise FailedPrecondition(
                f"ingress network cannot be removed because service {service.id} depends on it"
            )
    tx.rely_on_all(Service)  # services have no reference to the ingress network, because specs do not name it


def _check_door_unused(tx: Transaction, id: NetworkId) -> None:
    """Check that no service has routes over the network.  Its tasks would not be on the network that replaces it."""
    door = door_network(tx.find(Network))
    for service in exposed(tx) if door is not None and door.id == id else ():
        raise FailedPrecondition(f"network {id} is in use by service {service.id} ({service.spec.name})")
    tx.rely_on_all(Service)  # services have no reference to it, because routes are labels


def _check_vxlan_ids(tx: Transaction, spec: NetworkSpec) -> None:
    """Check that no other network has one of the named ids.  Raises: FailedPrecondition."""
    driver = spec.driver_configuration
    wanted = set(vxlan_ids(driver.options)) if driver is not None else set()
    for other in tx.find(Network) if wanted else ():
        requested = other.spec.driver_configuration or Driver()
        theirs = {*vxlan_ids(other.driver_state.options), *vxlan_ids(requested.options)}
        for number in sorted(wanted & theirs):
            raise FailedPrecondition(
                f"could not obtain vxlan id {number}: requested bit is already allocated "
                f"(to network {other.spec.name})"
            )


def _check_room(tx: Transaction, network: Network, configs: Sequence[IPAMConfig]) -> None:
    """Check that no other network has one of the subnets, that it has no failover address, and that no machine has a
    route to it.

    Raises: FailedPrecondition.
    """
    wanted = [subnet_of(config) for config in configs if config.subnet]
    for other in tx.find(Network) if wanted else ():
        for theirs in subnets_of(other) if other.id != network.id else ():
            for mine in wanted:
                if overlap(mine, theirs):
                    overlaps = f"Pool overlaps with other one on this address space: {mine}"
                    raise SubnetTaken(
                        f"{overlaps} and {theirs} of network {other.spec.name}",
                        stack=other.spec.labels.get(STACK_LABEL, ""),
                        unnamed=f"{overlaps} and a network of another stack",
                    )
    for address in addresses_in(tx).addresses if wanted else ():
        for mine in wanted:
            if parsed(address.address) in mine:
                # Users who may create networks need not see failover addresses.
                raise FailedPrecondition(
                    f"Pool overlaps with other one on this address space: {mine} and a failover address "
                    "(skep cluster address)"
                )
    driver = network.spec.driver_configuration
    allowed = {**network.spec.labels, **(driver.options if driver is not None else {})}.get(OVERLAP_LABEL)
    if not wanted or allowed == "true":
        return
    for clash in route_overlaps(wanted, tx.find(Node)):
        raise FailedPrecondition(
            f"Pool overlaps with other one on this address space: {clash} "
            f"(label {OVERLAP_LABEL}=true allows it)"
        )


def subnets_of(network: Network) -> list[Subnet]:
    """Return the network's current and requested subnets."""
    both = (network.ipam_options, network.spec.ipam_options)
    configs = [config for options in both if options is not None for config in options.configs]
    found = dict.fromkeys(subnet_of(config) for config in configs if config.subnet)
    return list(found) if is_overlay(network) else []


_NAMED_MAX = 5
"""Number of users that the error names if a network cannot be removed."""


def _names(tx: Transaction, error: InUse) -> str:
    """Return the names of the users in parentheses, without users that have no name."""
    names = []
    for kind, id in error.users:
        if kind == "service" and (service := tx.lookup(Service, id)) is not None:
            names.append(f"service {service.spec.name}")
        elif kind == "task" and (task := tx.lookup(Task, id)) is not None:
            attachment, node = task.spec.network_attachment_spec, tx.lookup(Node, task.node_id)
            where = node.shown_name if node is not None else task.node_id
            if attachment is not None:
                names.append(f"container {attachment.container_id[:12]} on node {where}")
    if not names:
        return ""
    rest = f" and {len(names) - _NAMED_MAX} more" if len(names) > _NAMED_MAX else ""
    return f" ({', '.join(names[:_NAMED_MAX])}{rest})"
