"""Reserved ports of nodes: the cluster uses them itself, or administrators need them to reach the node.

Only administrators may publish on them (``of_cluster``).  A node never publishes a container on its own reserved ports
(``node.host.own_ports``).  A failed bind would not protect them all, because some are bound late, such as the data
path's port with the first overlay network.
"""

from collections.abc import Iterable, Mapping
from typing import Final, TypeAlias

from skep.model.networks.addresses import joined, parted
from skep.model.networks.used_ports import RESERVED_LABEL, UsedPort, ports_in
from skep.model.node import Node

SSH_PORT: Final = 22
"""Registered port of SSH, by which machines are administered."""
IMAGES_PORT: Final = 2374
"""Default of ``image-port``, where nodes pull images from each other."""
API_PORT: Final = 2376
"""Conventional port of Docker's API with TLS, registered with IANA as docker-s."""
MANAGER_PORT: Final = 2377
"""Docker's port of managers."""
PEER_PORT: Final = 2378
"""Port of etcd on a manager with the default port (``default_peer_addr``)."""
PEER_PORT_OFFSET: Final = 10_000
"""Distance from a manager's port, if it is not the default, to etcd's port.  It is large because managers on one
machine often have neighboring ports (2477, 2478, 2479).  It leads below 32768, where Linux starts to assign ports to
programs on its own.
"""
GOSSIP_PORT: Final = 7946
"""Gossip port of docker nodes, and of managers, which relay gossip to them."""
_HIGH_PORT: Final = 55_000
"""From this listen port on, ``PEER_PORT_OFFSET`` is subtracted, because the sum would exceed the largest port."""
WIREGUARD_OFFSET: Final = 10
"""Distance from the VXLAN port to WireGuard's UDP ports: this one (4799) and the next (4800), unless configured."""


IMAGES_USE, _OVERLAYS, _ENCRYPTED = "images between nodes", "overlay networks", "encrypted networks"
"""Purposes of the ports that nodes use among each other, also through tunnels."""

TUNNEL_SLOT: Final = 3
"""Slot of the WireGuard device for tunnels through NAT, and the distance of its UDP port from WireGuard's first one.

Encrypted networks use slots 0 and 1.  The next port, VXLAN's port + 12, is the VXLAN port inside encrypted networks.
"""


def tunnel_port(vxlan_port: int, wireguard: int = 0) -> int:
    """Return the UDP port of tunnels through NAT, 4802 by default.  ``wireguard``: the configured port, or 0."""
    return (wireguard or vxlan_port + WIREGUARD_OFFSET) + TUNNEL_SLOT


def distant_peer_port(listen_port: int) -> int:
    """Return a port for the etcd of a manager at ``listen_port``, away from that port and its neighbors."""
    return listen_port + (PEER_PORT_OFFSET if listen_port < _HIGH_PORT else -PEER_PORT_OFFSET)


def default_peer_addr(listen_addr: str) -> str:
    """Return the peer address for the etcd of a new manager at ``listen_addr`` (``ip:port``).

    A manager with the default port 2377 gets 2378, because firewall rules usually open both.  Any other manager gets a
    port 10,000 away.
    """
    host, digits = parted(listen_addr)
    port = int(digits)
    return joined(host, PEER_PORT if port == MANAGER_PORT else distant_peer_port(port))


ReservedPorts: TypeAlias = Mapping[UsedPort, str]
"""The purpose of each reserved port, by protocol and number."""

_ALWAYS: Final[ReservedPorts] = {
    ("tcp", SSH_PORT): "SSH",
    ("tcp", IMAGES_PORT): IMAGES_USE,
    ("tcp", API_PORT): "the API",
    ("tcp", MANAGER_PORT): "managers",
    ("tcp", PEER_PORT): "etcd",
    ("tcp", GOSSIP_PORT): "docker nodes",
    ("udp", GOSSIP_PORT): "docker nodes",
}


def of_data_path(port: int, wireguard: int = 0) -> ReservedPorts:
    """Return the ports of overlay networks.  ``wireguard``: the configured port, or 0 to derive it from ``port``."""
    encrypted = wireguard or port + WIREGUARD_OFFSET
    return {
        ("udp", port): _OVERLAYS,
        ("udp", encrypted): _ENCRYPTED,
        ("udp", encrypted + 1): _ENCRYPTED,  # the next key has a port of its own during a key rotation
        ("udp", tunnel_port(port, wireguard)): "tunnels through NAT",
    }


def between_nodes(ports: ReservedPorts) -> tuple[UsedPort, ...]:
    """Return the ports among ``ports`` that nodes use among each other without a manager, in order."""
    return tuple(sorted(port for port, use in ports.items() if use in (IMAGES_USE, _OVERLAYS, _ENCRYPTED)))


def of_cluster(data_path_port: int, nodes: Iterable[Node]) -> ReservedPorts:
    """Return the ports that only administrators may publish on, in a cluster with these ``nodes``.

    Labels of workers are ignored, because a compromised worker could reserve any port.
    """
    found: dict[UsedPort, str] = {}
    for node in nodes:
        status = node.manager_status
        if status is None:
            continue
        found |= dict.fromkeys(ports_in(node.description.engine.labels.get(RESERVED_LABEL, "")), "a manager")
        for address, use in ((status.addr, "managers"), (status.peer_addr, "etcd")):
            number = parted(address)[1]
            if number.isascii() and number.isdigit():
                found["tcp", int(number)] = use
    return {**found, **of_data_path(data_path_port), **_ALWAYS}
