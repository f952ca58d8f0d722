"""A container's network sandbox: its network namespace, its endpoints on networks, its published ports.

The engine records these values with each container; the data plane makes them.  The terms are libnetwork's.  Records of
containers are files, so serialized names stay: where one differs from its attribute, ``name`` gives it.
"""

from collections.abc import Mapping, Sequence
from enum import Enum

import msgspec

from skep.model.ids import ContainerId, NetworkId, TaskId
from skep.model.service import PortConfig
from skep.model.tables import NetworkHead


class NetworkMode(Enum):
    """The kind of network a container has (``HostConfig.NetworkMode``)."""

    BRIDGE = "bridge"
    """The node's gateway bridge alone."""
    NETWORKS = "networks"
    """Named networks."""
    NONE = "none"
    """Its own loopback."""
    HOST = "host"
    """The node's."""
    CONTAINER = "container"
    """Another container's."""


class EndpointRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A requested network.  ``network``: an id or a name, as given."""

    network: str
    aliases: tuple[str, ...] = ()
    address: str = ""
    """``--ip``; empty: any."""
    address6: str = ""
    """``--ip6``; empty: any that the network has."""
    mac_address: str = ""
    """``--mac-address``; empty: one that follows from its address."""
    links: tuple[str, ...] = ()
    """``container:alias``: further names that this container alone has for others."""


class EndpointConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A network that a container is to be on, with its addresses there.  ``addresses``: ``ip/length``, IPv4 first."""

    head: NetworkHead
    addresses: tuple[str, ...]
    aliases: tuple[str, ...] = ()
    """Further names of this container alone."""
    mac_address: str = ""
    """That its user has chosen; empty: none."""
    links: tuple[str, ...] = ()
    """As in ``EndpointRequest``."""
    attachment: TaskId = TaskId("")
    """The attachment task by which the cluster reserves this endpoint for a plain container; empty: none."""


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A container on one network: ``interface`` in its namespace, ``port`` on the network's bridge."""

    # "place", and "places" below, are the names in the state files of containers, which do not change.
    config: EndpointConfig = msgspec.field(name="place")
    interface: str
    port: str
    mac_address: str

    @property
    def network_id(self) -> NetworkId:
        """Of the network that it is on."""
        return self.config.head.id

    @property
    def network_name(self) -> str:
        """Of the network that it is on."""
        return self.config.head.name

    @property
    def address(self) -> str:
        """Its first address, without the prefix length."""
        return self.config.addresses[0].partition("/")[0]

    @property
    def prefix_length(self) -> int:
        """Of the subnet that its first address is in."""
        return int(self.config.addresses[0].partition("/")[2])


class PublishedPort(PortConfig):
    """A port published on the node.  ``host_ip``: the only address it listens on; empty: all."""

    host_ip: str = ""


def as_requested(ports: Sequence[PublishedPort]) -> tuple[PublishedPort, ...]:
    """``ports`` of a sandbox without the IPv6 twins of those that are published on all addresses."""
    twins = {msgspec.structs.replace(port, host_ip="::") for port in ports if not port.host_ip}
    return tuple(port for port in ports if port not in twins)


class SandboxConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A container as its networks see it: what its sandbox is made from.  Not serialized."""

    id: ContainerId
    name: str
    hostname: str = ""
    """One of its names on its networks, as in Docker; empty: none."""
    task: TaskId = TaskId("")
    """Its task, whose id its endpoints have in network tables; empty: a plain container."""
    mode: NetworkMode = NetworkMode.BRIDGE
    networks: tuple[EndpointRequest, ...] = ()
    """Requested networks, in the order of its interfaces, on which it gets endpoints when it starts."""
    endpoints: tuple[EndpointConfig, ...] = ()
    """Endpoints that it has been given already (a task's), likewise."""
    mac_address: str = ""
    """On the gateway bridge where that is its network; empty: one that follows from its address."""
    ports: tuple[PublishedPort, ...] = ()
    """Host-mode ports to publish on the node."""
    sysctls: Mapping[str, str] = {}
    """As its user has set them."""
    nameservers: tuple[str, ...] = ()
    dns_options: tuple[str, ...] = ()


class Sandbox(msgspec.Struct, frozen=True, kw_only=True):
    """A container's network namespace with its endpoints, and with its interface on the node's gateway bridge.

    ``netns``: path of the namespace; ``ports``: host-mode ports as published.  ``address`` and the fields after it are
    those on the gateway bridge, empty where the container has no interface there (internal networks only).
    """

    netns: str
    address: str = ""
    prefix_length: int = 0
    gateway: str = ""
    mac_address: str = ""
    network: str = ""
    """Name of the bridge network."""
    interface: str = "eth0"
    """Of the gateway bridge, in the container's namespace."""
    port: str = ""
    """The container's port on the gateway bridge."""
    address6: str = ""
    """On the gateway bridge too, in a /64; empty without a default route by IPv6."""
    gateway6: str = ""
    is_open: bool = False
    """It reaches other open ones by the gateway bridge, which is its only network."""
    ports: tuple[PublishedPort, ...] = ()
    endpoints: tuple[Endpoint, ...] = msgspec.field(name="places", default=())
    """In the order of its interfaces."""
    sysctls: Mapping[str, str] = {}
    """Of its namespace (``net/...``), as the node sets them; those that the user has set are not among them."""

    @property
    def own_addresses(self) -> Sequence[str]:
        """The addresses of the container's own name in its hosts file: those on its networks without ingress, as in
        Docker.

        Where that leaves none, the one on the gateway bridge.
        """
        found = [
            one.partition("/")[0]
            for endpoint in self.endpoints
            if not endpoint.config.head.is_ingress
            for one in endpoint.config.addresses
        ]
        return found or [one for one in (self.address,) if one]
