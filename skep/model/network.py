"""Cluster networks."""

from collections.abc import Iterable, Mapping
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_interface
from typing import ClassVar, Final

from skep.model.values.encoding import ApiObject, always
from skep.model.values.ids import NetworkId
from skep.model.values.meta import Driver, Version
from skep.model.values.times import ZERO_TIME, Timestamp

MTU_OPTION: Final = "com.docker.network.driver.mtu"
OVERLAP_LABEL: Final = "skep.allow-overlap"
"""Label or driver option that allows a subnet although a machine already has a route to it."""
MTUS: Final = range(68, 1 << 16)
"""The range of IPv4's MTU."""


class IPAMConfig(ApiObject):
    """One subnet of a network.  ``auxiliary_addresses`` maps names to addresses that are never allocated."""

    subnet: str = ""
    range: str = ""
    gateway: str = ""
    auxiliary_addresses: Mapping[str, str] = {}


class IPAMOptions(ApiObject):
    """A network's subnets: the requested ones in a spec, the allocated ones in the network itself."""

    driver: Driver = always(Driver())
    configs: tuple[IPAMConfig, ...] = ()


class ConfigReference(ApiObject):
    """The node-local network with the settings of a cluster network (macvlan, ipvlan)."""

    __go_name__: ClassVar[str | None] = "network.ConfigReference"

    network: str = always("")


class NetworkSpec(ApiObject):
    """The user's spec of a network, as the cluster stores it.  ``/networks`` shows the same fields in a flat form."""

    name: str = ""
    labels: Mapping[str, str] = always({})
    driver_configuration: Driver | None = None
    ipv6_enabled: bool = False
    internal: bool = False
    attachable: bool = False
    ingress: bool = False
    ipam_options: IPAMOptions | None = None
    scope: str = ""
    config_from: ConfigReference | None = None


class Network(ApiObject):
    """A network.  The API writes ``spec``, the leader ``driver_state`` and ``ipam_options``."""

    id: NetworkId
    version: Version = always(Version())
    created_at: Timestamp = always(ZERO_TIME)
    updated_at: Timestamp = always(ZERO_TIME)
    spec: NetworkSpec = always(NetworkSpec())
    driver_state: Driver = always(Driver())
    ipam_options: IPAMOptions | None = None


def is_ingress(network: Network) -> bool:
    """Return whether this is the network for published ports between nodes."""
    spec = network.spec
    return spec.ingress or (spec.name == "ingress" and _INTERNAL_LABEL in spec.labels)


def most_complete(copies: Iterable[Network]) -> Network:
    """Return the latest of the copies of a removed network in its tasks.  Subnets are only ever added."""

    def order(one: Network) -> tuple[int, int]:
        return len(one.ipam_options.configs) if one.ipam_options is not None else 0, one.version.index

    return max(copies, key=order)


_INTERNAL_LABEL = "com.docker.swarm.internal"
"""Label of the ingress network in early swarms."""


def subnet_of(config: IPAMConfig) -> IPv4Network | IPv6Network:
    """Return the subnet, without host bits that the user may have written."""
    return network_of(config.subnet)


@lru_cache(1 << 14)
def network_of(text: str) -> IPv4Network | IPv6Network:
    """Return the network of an ``address/length``.  Cached: called for every task, and for all networks of a stack."""
    return ip_interface(text).network
