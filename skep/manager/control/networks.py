"""Operations on cluster networks.

Source: swarmkit, manager/controlapi/network.go; moby 20.10, daemon/cluster/networks.go.
"""

import ipaddress
from collections.abc import Iterable

from skep.api.errors import Forbidden
from skep.errors import AlreadyExists, FailedPrecondition, InvalidArgument, PermissionDenied, Unimplemented
from skep.manager.control.names import check_dns_name
from skep.model.ids import IdSource, NetworkId
from skep.model.meta import Driver
from skep.model.network import IPAMConfig, IPAMOptions, Network, NetworkSpec
from skep.model.planes import PLANE_OPTION, PLANES
from skep.model.service import PublishMode, Service
from skep.model.times import Timestamp
from skep.store.interface import InUse, Transaction, View

PREDEFINED_LABEL = "com.docker.swarm.predefined"
INTERNAL_LABEL = "com.docker.swarm.internal"
_DRIVERS = frozenset({"overlay", "macvlan", "bridge", "ipvlan", "host"})
_NODE_LOCAL = ("bridge", "host")
_NAMES_OF_THE_ENGINE = frozenset({"bridge", "host", "none", "default"})


def create_network(tx: Transaction, spec: NetworkSpec, *, new_id: IdSource, now: Timestamp) -> Network:
    """Create a network that services can be attached to.

    Raises:
        Forbidden: the name is one of the engine's own networks.
        InvalidArgument, PermissionDenied, Unimplemented: the spec can never work.
        AlreadyExists: the name is taken, or there is an ingress network already.
    """
    _check_network_spec(spec)
    if spec.ingress:
        present = ingress_network(tx)
        if present is not None:
            raise AlreadyExists(f"ingress network ({present.id}) is already present")
    return tx.put(Network(id=NetworkId(new_id()), created_at=now, spec=spec))


def remove_network(tx: Transaction, id: NetworkId) -> None:
    """Remove a network that no service uses.

    Raises:
        NotFound: it is gone.
        FailedPrecondition: a service uses it, or it is the cluster's own.
    """
    network = tx.get(Network, id)
    if network.spec.labels.get(PREDEFINED_LABEL) == "true":
        raise FailedPrecondition(
            f"network {id} ({network.spec.name}) is a swarm predefined network and cannot be removed"
        )
    if is_ingress(network):
        _check_ingress_unused(tx)
    try:
        tx.delete(Network, id)
    except InUse as error:
        kind, user = error.users[0]
        raise FailedPrecondition(f"network {id} is in use by {kind} {user}") from error


def check_name(name: str) -> None:
    """Refuse the names of the engine's own networks.  Raises: Forbidden, in the engine's words."""
    if name in _NAMES_OF_THE_ENGINE:
        raise Forbidden(f"{name} is a pre-defined network and cannot be created")


def first_networks(*, new_id: IdSource, now: Timestamp) -> tuple[Network, ...]:
    """The networks that a new cluster begins with: ingress, and the nodes' own bridge and host."""
    ingress = NetworkSpec(
        name="ingress",
        driver_configuration=Driver(name="overlay"),
        ingress=True,
        ipam_options=IPAMOptions(driver=Driver(name="default")),
    )
    local = (
        NetworkSpec(name=name, labels={PREDEFINED_LABEL: "true"}, driver_configuration=Driver(name=name))
        for name in _NODE_LOCAL
    )
    return tuple(Network(id=NetworkId(new_id()), created_at=now, spec=spec) for spec in (ingress, *local))


def is_ingress(network: Network) -> bool:
    """Whether this is the network that carries published ports from node to node."""
    spec = network.spec
    return spec.ingress or (spec.name == "ingress" and INTERNAL_LABEL in spec.labels)


def ingress_network(view: View) -> Network | None:
    """The cluster's ingress network, if it has one."""
    return next(filter(is_ingress, view.find(Network)), None)


def _check_ingress_unused(tx: Transaction) -> None:
    for service in tx.find(Service):
        endpoint = service.spec.endpoint_spec
        ports = endpoint.ports if endpoint is not None and service.removed_at is None else ()
        if any(port.publish_mode is PublishMode.INGRESS for port in ports):
            raise FailedPrecondition(
                f"ingress network cannot be removed because service {service.id} depends on it"
            )


def _check_network_spec(spec: NetworkSpec) -> None:
    driver = spec.driver_configuration
    if spec.ingress and driver is not None and driver.name != "overlay":
        raise Unimplemented("only overlay driver is currently supported for ingress network")
    if spec.attachable and spec.ingress:
        raise InvalidArgument("ingress network cannot be attachable")
    check_dns_name(spec.name)
    if PREDEFINED_LABEL in spec.labels:
        raise PermissionDenied(
            f"label {PREDEFINED_LABEL} is for internally created predefined networks and cannot be applied by users"
        )
    if driver is not None:
        _check_driver(driver)
    _check_plane(spec)
    if spec.ipam_options is not None:
        _check_addresses(spec.ipam_options.driver, spec.ipam_options.configs)


def _check_plane(spec: NetworkSpec) -> None:
    named = (
        spec.labels.get(PLANE_OPTION),
        spec.driver_configuration and (spec.driver_configuration.options.get(PLANE_OPTION)),
    )
    for plane in named:
        if plane is not None and plane not in PLANES:
            raise InvalidArgument(f"{PLANE_OPTION} is docker or skep, not {plane!r}")


def _check_driver(driver: Driver) -> None:
    if not driver.name:
        raise InvalidArgument("driver name: if driver is specified name is required")
    if driver.name not in _DRIVERS:
        raise InvalidArgument(f"error during lookup of plugin {driver.name}")


def _check_addresses(driver: Driver, configs: Iterable[IPAMConfig]) -> None:
    if not driver.name:
        raise InvalidArgument("driver name: if driver is specified name is required")
    if driver.name.lower() != "default":
        raise InvalidArgument(f"error during lookup of plugin {driver.name}")
    for config in configs:
        _check_subnet(config)


def is_subnet(text: str) -> bool:
    """Whether ``text`` is an address with the length of a prefix (``10.0.9.0/24``)."""
    address, slash, length = text.partition("/")
    try:
        ipaddress.ip_interface(text)
    except ValueError:
        return False
    return bool(address and slash) and length.isdigit()


def _check_subnet(config: IPAMConfig) -> None:
    if not is_subnet(config.subnet):
        raise InvalidArgument(f"ipam configuration: invalid subnet {config.subnet}")
    subnet = ipaddress.ip_interface(config.subnet).network
    if config.range:
        try:
            inner = ipaddress.ip_interface(config.range).ip
        except ValueError:
            raise InvalidArgument(f"ipam configuration: invalid range {config.range}") from None
        if inner not in subnet:
            raise InvalidArgument(
                f"ipam configuration: subnet {config.subnet} does not contain range {config.range}"
            )
    if config.gateway:
        try:
            gateway = ipaddress.ip_address(config.gateway)
        except ValueError:
            raise InvalidArgument(f"ipam configuration: invalid gateway {config.gateway}") from None
        if gateway not in subnet:
            raise InvalidArgument(
                f"ipam configuration: subnet {config.subnet} does not contain gateway {config.gateway}"
            )
