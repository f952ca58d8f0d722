"""A container's network sandbox: its network namespace, its endpoints on networks and its published ports.

The engine records these values with each container, and the data plane creates them.  The terms are libnetwork's.
Container records are files, so serialized names never change: fields with a different attribute have ``name=``.
"""

import re
from collections.abc import Mapping, Sequence
from enum import Enum

import msgspec

from skep.model.networks.tables import NetworkHead
from skep.model.service import PortConfig
from skep.model.values.ids import ContainerId, NetworkId, TaskId
from skep.model.values.user_map import UserMap

_IFNAME = re.compile(r"(?<=\.)(IFNAME|ifname)(?=\.)")


class NetworkMode(Enum):
    """The kind of network a container has (``HostConfig.NetworkMode``)."""

    BRIDGE = "bridge"
    """The node's gateway bridge alone."""
    NETWORKS = "networks"
    """Named networks."""
    NONE = "none"
    """Only a loopback interface."""
    HOST = "host"
    """The node's network namespace."""
    CONTAINER = "container"
    """Another container's network namespace."""


class EndpointRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A requested network.  ``network``: an id or a name, as given."""

    network: str
    aliases: tuple[str, ...] = ()
    address: str = ""
    """Value of ``--ip``, or empty for any address."""
    address6: str = ""
    """Value of ``--ip6``, or empty for any IPv6 address if the network has IPv6."""
    mac_address: str = ""
    """Value of ``--mac-address``, or empty to derive the address from the IP address."""
    links: tuple[str, ...] = ()
    """Links as ``container:alias``: names of other containers that only this container can resolve."""
    gw_priority: int = 0
    """Priority of this network's gateway.  The highest one becomes the container's default route."""
    sysctls: str = ""
    """Sysctls of its interface, with commas: ``net.ipv4.conf.IFNAME.log_martians=1``."""


class EndpointConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A container's endpoint on a network before it starts.  ``addresses``: ``ip/length``, IPv4 first."""

    head: NetworkHead
    addresses: tuple[str, ...]
    aliases: tuple[str, ...] = ()
    """Additional names that resolve to this container only."""
    mac_address: str = ""
    """Set by the user.  Empty if unset."""
    links: tuple[str, ...] = ()
    """See ``EndpointRequest.links``."""
    gw_priority: int = 0
    """See ``EndpointRequest.gw_priority``."""
    sysctls: str = ""
    """See ``EndpointRequest.sysctls``."""
    attachment: TaskId = TaskId("")
    """Attachment task by which the cluster reserves the endpoint for a plain container.  Empty without one."""


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A container on one network: ``interface`` in its namespace, ``port`` on the network's bridge."""

    # "place", and "places" below, are the names in the state files of containers, which do not change.
    config: EndpointConfig = msgspec.field(name="place")
    interface: str
    port: str
    mac_address: str

    @property
    def sysctls(self) -> dict[str, str]:
        """Return the sysctls of its interface."""
        pairs = (one.partition("=") for one in self.config.sysctls.split(",") if one)
        return {_IFNAME.sub(self.interface, name, count=1): value for name, _, value in pairs}

    @property
    def network_id(self) -> NetworkId:
        """Return the network's id."""
        return self.config.head.id

    @property
    def network_name(self) -> str:
        """Return the network's name."""
        return self.config.head.name

    @property
    def address(self) -> str:
        """Return the first address, without the prefix length."""
        return self.config.addresses[0].partition("/")[0]

    @property
    def prefix_length(self) -> int:
        """Return the prefix length of the first address."""
        return int(self.config.addresses[0].partition("/")[2])


class PublishedPort(PortConfig):
    """A port published on the node.  ``host_ip``: the only address it listens on, or empty for all."""

    host_ip: str = ""


def as_requested(ports: Sequence[PublishedPort]) -> tuple[PublishedPort, ...]:
    """Return ``ports`` of a sandbox without the IPv6 twins of ports that are published on all addresses."""
    twins = {msgspec.structs.replace(port, host_ip="::") for port in ports if not port.host_ip}
    return tuple(port for port in ports if port not in twins)


class SandboxConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A container's network settings, from which its sandbox is created.  Not serialized."""

    id: ContainerId
    name: str
    hostname: str = ""
    """Host name, which also resolves on its networks, as in Docker.  Empty if unset."""
    task: TaskId = TaskId("")
    """The container's task, which identifies its endpoints in network tables.  Empty for a plain container."""
    mode: NetworkMode = NetworkMode.BRIDGE
    networks: tuple[EndpointRequest, ...] = ()
    """Requested networks, on which it gets endpoints when it starts, in the order of its interfaces."""
    endpoints: tuple[EndpointConfig, ...] = ()
    """Endpoints that are allocated already (for tasks), in the order of its interfaces."""
    mac_address: str = ""
    """MAC address on the gateway bridge, if that is its network, or empty to derive it from the IP address."""
    ports: tuple[PublishedPort, ...] = ()
    """Host-mode ports to publish on the node."""
    sysctls: Mapping[str, str] = {}
    """Sysctls set by the user."""
    nameservers: tuple[str, ...] = ()
    dns_options: tuple[str, ...] = ()
    serves_ipv6: bool = False
    """See ``Sandbox.serves_ipv6``."""
    users: UserMap | None = None
    """The users to whom the namespace belongs, or None for the machine's."""
    userns: str = ""
    """Path of the user namespace to which it belongs.  Empty for a new one with ``users``."""


class Sandbox(msgspec.Struct, frozen=True, kw_only=True):
    """A container's network namespace with its endpoints, and with its interface on the node's gateway bridge.

    ``netns``: path of the namespace.  ``ports``: host-mode ports as published.  ``address`` and the following fields
    describe the interface on the gateway bridge, and are empty without one (on internal networks only).
    """

    netns: str
    address: str = ""
    prefix_length: int = 0
    gateway: str = ""
    mac_address: str = ""
    network: str = ""
    """Name of the bridge network."""
    interface: str = "eth0"
    """Interface on the gateway bridge, in the container's namespace."""
    port: str = ""
    """The container's port on the gateway bridge."""
    address6: str = ""
    """IPv6 address on the gateway bridge, in a /64.  Empty without a default IPv6 route."""
    gateway6: str = ""
    serves_ipv6: bool = False
    """Whether it listens for IPv6 at its TCP ports.  The kernel then leads IPv6 clients to ``address6``, and the
    container sees their addresses.  Otherwise the net process relays them to ``address``."""
    is_open: bool = False
    """Whether the gateway bridge is its only network.  It then reaches other such sandboxes on that bridge."""
    ports: tuple[PublishedPort, ...] = ()
    endpoints: tuple[Endpoint, ...] = msgspec.field(name="places", default=())
    """Endpoints in the order of its interfaces."""
    sysctls: Mapping[str, str] = {}
    """Sysctls of its namespace (``net/...``) that the node sets, without the user's."""
    userns: str = ""
    """Path of the user namespace to which ``netns`` belongs.  Empty for the machine's."""

    @property
    def own_addresses(self) -> Sequence[str]:
        """Return the addresses of the container's own name in its hosts file.

        As in Docker, these are the addresses on its networks without ingress, or else that on the gateway bridge.
        """
        found = [
            one.partition("/")[0]
            for endpoint in self.endpoints
            if not endpoint.config.head.is_ingress
            for one in endpoint.config.addresses
        ]
        return found or [one for one in (self.address,) if one]
