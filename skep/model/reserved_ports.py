"""Ports of the machines that the cluster itself uses, or without which they cannot be reached.

Users other than administrators publish nothing on them (``of_cluster``).  A node gives its own to no container, whoever
asks (``node.own_ports``): some are not bound yet when a container would take them, such as the data path's before the
first overlay network.
"""

from collections.abc import Iterable, Mapping
from typing import Final, TypeAlias

from skep.model.addresses import joined, parted
from skep.model.node import Node
from skep.model.used_ports import RESERVED_LABEL, UsedPort, ports_in

SSH_PORT: Final = 22
IMAGES_PORT: Final = 2374
API_PORT: Final = 2376
"""Where Docker's API is served by TLS, by convention; registered with IANA as docker-s."""
MANAGER_PORT: Final = 2377
PEER_PORT: Final = 2378
"""etcd's, of a manager on the default port (``default_peer_addr``)."""
PEER_PORT_OFFSET: Final = 10_000
"""From the port of another manager to etcd's: managers of one machine often have neighboring ports (2477, 2478, 2479),
and Linux gives no program a port below 32768 that it did not ask for."""
GOSSIP_PORT: Final = 7946
"""Of docker nodes, and of managers, which relay it to them."""
_HIGH_PORT: Final = 55_000
"""Ports from here on have too few ports above them."""
WIREGUARD_OFFSET: Final = 10
"""WireGuard's UDP ports are that of VXLAN plus this (4799) and the next (4800), unless the node is configured so."""


def distant_peer_port(listen_port: int) -> int:
    """A port for the etcd of a manager at ``listen_port``, away from that and its neighbors."""
    return listen_port + (PEER_PORT_OFFSET if listen_port < _HIGH_PORT else -PEER_PORT_OFFSET)


def default_peer_addr(listen_addr: str) -> str:
    """Where the etcd of a new manager at ``listen_addr`` (``ip:port``) listens for the others.

    2378 beside the default 2377, which firewalls know; else the port that is 10,000 further.
    """
    host, digits = parted(listen_addr)
    port = int(digits)
    return joined(host, PEER_PORT if port == MANAGER_PORT else distant_peer_port(port))


ReservedPorts: TypeAlias = Mapping[UsedPort, str]
"""By protocol and number what the port is for."""

_ALWAYS: Final[ReservedPorts] = {
    ("tcp", SSH_PORT): "SSH",
    ("tcp", IMAGES_PORT): "images between nodes",
    ("tcp", API_PORT): "the API",
    ("tcp", MANAGER_PORT): "managers",
    ("tcp", PEER_PORT): "etcd",
    ("tcp", GOSSIP_PORT): "docker nodes",
    ("udp", GOSSIP_PORT): "docker nodes",
}


def of_data_path(port: int, wireguard: int = 0) -> ReservedPorts:
    """The ports of overlay networks.  ``wireguard``: as configured; 0: after the data path's ``port``."""
    encrypted = wireguard or port + WIREGUARD_OFFSET
    return {
        ("udp", port): "overlay networks",
        ("udp", encrypted): "encrypted networks",
        ("udp", encrypted + 1): "encrypted networks",  # of the next key, while keys rotate
    }


def of_cluster(data_path_port: int, nodes: Iterable[Node]) -> ReservedPorts:
    """What only administrators may publish on, in a cluster with these ``nodes``.

    Workers' labels do not count: one that is compromised could reserve what it likes.
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
