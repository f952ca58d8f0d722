"""The two data planes of overlay networks: Docker Engine's and Skep's.

Docker Engines exchange the addresses of containers by gossip; skep nodes get them from the managers.  Both use VXLAN,
but neither gets the addresses of the other's containers.  So an overlay network belongs to one of the two, and its
tasks run on nodes of that kind (docs/decisions/0011).
"""

from collections.abc import Iterable, Mapping
from functools import lru_cache
from hashlib import sha256
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Network
from typing import Final

from skep.model.network import Network
from skep.model.networks.addresses import is_of_a_machine, parsed
from skep.model.networks.wireguard import PublicKey, parsed_key
from skep.model.node import Node, NodeState
from skep.model.swarm import DEFAULT_DATA_PATH_PORT, Swarm
from skep.model.values.ids import NodeId

DOCKER: Final = "docker"
SKEP: Final = "skep"
PLANES: Final = frozenset({DOCKER, SKEP})

PLANE_OPTION: Final = "skep.data-plane"
"""Name of a network's driver option or label with the requested plane, and of the driver state's option with the actual
plane.
"""

NODE_LABEL: Final = "skep.node"
"""Engine label that identifies a skep node; Docker Engines do not have it."""

DATA_PATH_LABEL: Final = "skep.data-path-addr"
"""Engine label of a skep node with the underlay address of its VXLAN."""

REFUSED_DATA_PATH_LABEL: Final = "skep.data-path-addr.refused"
"""A manager renames ``DATA_PATH_LABEL`` to this if the address belongs to another node."""

PATHS_LABEL: Final = "skep.paths"
"""Engine label of skep nodes that send probes and respond to them."""

LOCAL_ADDRESSES_LABEL: Final = "skep.local-addrs"
"""Engine label with the addresses from which a node connects to the managers, as the node itself sees them.

Each has the prefix length of its subnet: ``10.0.0.5/24,192.168.1.2/24``.
"""

NAT_LABEL: Final = "skep.behind-nat"
"""Engine label with the configured name of the NAT that a node is behind, or ``no``.  Without it, managers decide."""

TUNNEL_LABEL: Final = "skep.nat-tunnel"
"""Engine label with the WireGuard key of a node's tunnels through NAT: ``KEY@PORT``.  Without it, it has none."""

REFUSED_TUNNEL_LABEL: Final = "skep.nat-tunnel.refused"
"""A manager renames ``TUNNEL_LABEL`` to this if the key belongs to another node."""

SEEN_NAT_LABEL: Final = "skep.behind-nat.seen"
"""Engine label that managers set: the last address of a NAT from which they saw the node since it started."""

RELAY_LABEL: Final = "skep.relay"
"""Node label.  With ``true``, the node relays before others, and with ``false`` it never relays."""

TUNNEL_NETWORK: Final = "240.0.0.0/4"
"""Addresses of nodes behind NAT, inside the tunnels.

The range is reserved and hardly used (RFC 1112, section 4).  No network may have a subnet in it, and no node may report
an address in it.
"""

IMAGES_LABEL: Final = "skep.images-port"
"""Engine label of a skep node with the port at which it serves its images to other nodes."""

NODE_DRIVERS: Final = frozenset({"host", "bridge", "null", "none", "macvlan", "ipvlan"})
"""Drivers of networks that are local to one node."""


def driver_of(network: Network) -> str:
    """Return the network's driver: the allocated one, else the requested one."""
    requested = network.spec.driver_configuration
    return network.driver_state.name or (requested.name if requested else "") or "overlay"


def is_overlay(network: Network) -> bool:
    """Return whether the cluster allocates addresses on the network, and a data plane connects the nodes."""
    return driver_of(network) not in NODE_DRIVERS


def requested_plane(network: Network) -> str:
    """Return the plane that the user requested for the network, or an empty text."""
    driver = network.spec.driver_configuration
    named = driver.options.get(PLANE_OPTION, "") if driver is not None else ""
    return named or network.spec.labels.get(PLANE_OPTION, "")


def plane_of(network: Network) -> str:
    """Return the network's plane, or an empty text as long as no task has determined it."""
    return network.driver_state.options.get(PLANE_OPTION, "") or requested_plane(network)


def is_docker_node(node: Node) -> bool:
    """Return whether the node is a Docker Engine; False before its first description.

    The kind under which it joined takes precedence over its description, because docker nodes receive keys that skep
    nodes must not get.
    """
    engine = node.description.engine
    if node.certificate is not None and node.certificate.plane:
        return bool(engine.engine_version) and node.certificate.plane == DOCKER
    return bool(engine.engine_version) and NODE_LABEL not in engine.labels


def probes_paths(node: Node) -> bool:
    """Return whether the node sends probes and responds to them."""
    return PATHS_LABEL in node.description.engine.labels


def plane_of_node(node: Node) -> str:
    """Return the data plane of the node."""
    return DOCKER if is_docker_node(node) else SKEP


def underlay_of(node: Node) -> str:
    """Return the node's underlay address from its label, else the source address of its connection to the managers.

    Returns an empty text if other machines can reach neither address.  A loopback source address is kept, because such
    a node runs on its manager's machine.  A node behind NAT has an address inside the tunnels.
    """
    if is_reached_by_tunnels(node):
        return tunnel_address(node.id)
    reported = node.description.engine.labels.get(DATA_PATH_LABEL, "")
    return usable_address(reported) or usable_address(node.status.addr, may_be_loopback=True)


def nat_of(node: Node) -> str:
    """Return the name of the NAT that the node is behind, or an empty text if others reach the node directly.

    Without a configured name, a worker is behind NAT if it connects from an IPv4 address that it does not have itself.
    The NAT is then called like that address.  Once managers have seen one, it counts for all sessions until the node's
    machine restarts, so that its underlay address does not change if some managers see it directly.

    Managers are not behind NAT, because others reach them under their own address.  Neither are nodes without overlay
    networks, such as rootless ones.
    """
    labels = node.description.engine.labels
    if node.manager_status is not None or not probes_paths(node):
        return ""
    if configured := labels.get(NAT_LABEL, ""):
        return configured if configured != _NO_NAT else ""
    if usable_address(labels.get(DATA_PATH_LABEL, "")):
        return ""
    return seen_nat(labels, node.status.addr) or labels.get(SEEN_NAT_LABEL, "")


def seen_nat(labels: Mapping[str, str], seen: str) -> str:
    """Return ``seen``, the address from which a node with these labels connects, or an empty text without NAT."""
    local = _local_addresses(labels)
    if not local or ":" in seen or not usable_address(seen):  # tunnels have IPv4 addresses only
        return ""
    return seen if seen not in local else ""


def _local_addresses(labels: Mapping[str, str]) -> tuple[str, ...]:
    words = labels.get(LOCAL_ADDRESSES_LABEL, "")
    return tuple(word.partition("/")[0] for word in words.split(",")) if words else ()


def is_reached_by_tunnels(node: Node) -> bool:
    """Return whether the node is behind NAT and has tunnels to others."""
    return bool(nat_of(node)) and tunnel_key(node) is not None


def tunnel_key(node: Node) -> PublicKey | None:
    """Return the WireGuard key of the node's tunnels through NAT, or None if it has none."""
    return tunnel_key_in(node.description.engine.labels)


def tunnel_key_in(labels: Mapping[str, str]) -> PublicKey | None:
    """Return the key of tunnels in engine labels, or None."""
    return parsed_key(labels.get(TUNNEL_LABEL, ""))


def local_interface(node: Node) -> IPv4Interface | None:
    """Return the node's own address and subnet behind the NAT, or None if it reports no plausible ones.

    Its neighbors behind the same NAT send packets there, so the address has to be a private one.
    """
    word = node.description.engine.labels.get(LOCAL_ADDRESSES_LABEL, "").partition(",")[0]
    address, _, length = word.partition("/")
    if not (usable_address(address) and length.isascii() and length.isdigit()):
        return None
    try:
        found = IPv4Interface(word)
    except ValueError:
        return None
    return found if not found.is_global else None


@lru_cache(maxsize=4096)
def tunnel_address(id: NodeId) -> str:
    """Return the address of a node behind NAT, inside the tunnels: 28 bits of its id's hash, after 240.0.0.0.

    Managers issue ids, so no node can choose the address of another.  Of 1,000 nodes behind NAT, two have the same
    address with a probability of 0.2 %.  The second to join then has neither tunnels nor overlay networks (``holder``).
    """
    number = int.from_bytes(sha256(id.encode()).digest()[:8], "big") % _TUNNEL_ADDRESSES
    return str(IPv4Address(_FIRST_TUNNEL_ADDRESS + number))


_TUNNEL_NETWORK = IPv4Network(TUNNEL_NETWORK)
_NO_NAT = "no"
"""Value of ``NAT_LABEL`` of a node that others reach directly, whatever managers see."""
_FIRST_TUNNEL_ADDRESS = (240 << 24) + 1
"""240.0.0.1."""
_TUNNEL_ADDRESSES = (15 << 24) - 1
"""All addresses up to 254.255.255.255, because some routers treat all of 255.0.0.0/8 as broadcasts."""


def claimed_underlay(node: Node) -> str | None:
    """Return the underlay address that no other node may have while this one is up, or None."""
    if node.status.state is NodeState.DOWN or is_docker_node(node):
        return None
    underlay = underlay_of(node)
    return underlay if underlay and not parsed(underlay).is_loopback else None


def holder(claiming: Iterable[Node]) -> NodeId | None:
    """Return which of the nodes that claim an underlay address owns it, or None without nodes.

    The owner is the node that connects to the managers from this address, because a source address of a TCP connection
    cannot be forged.  Without such a node it is the node that joined first.  Network tables and tunnels through NAT
    follow this rule.  Tunnels also count nodes that are down, which own an address only if no other node claims it.
    """

    def order(node: Node) -> tuple[bool, bool, str, str]:
        is_down = node.status.state is NodeState.DOWN
        return is_down, node.status.addr != underlay_of(node), node.created_at, node.id

    return min(claiming, key=order).id if (claiming := list(claiming)) else None


@lru_cache(maxsize=16384)  # called for every node, for each image that a node requests
def usable_address(text: str, *, may_be_loopback: bool = False) -> str:
    """Return the address ``text`` in canonical form, or an empty text if other machines cannot connect to it.

    No node has an address in ``TUNNEL_NETWORK`` of its own, because managers assign those.
    """
    try:
        address = parsed(text)
    except ValueError:
        return ""
    is_usable = is_of_a_machine(address) or (may_be_loopback and address.is_loopback)
    return str(address) if is_usable and address not in _TUNNEL_NETWORK else ""


def why_reserved(subnet: IPv4Network | IPv6Network) -> str:
    """Return why no network can have ``subnet``, as the end of a sentence, or an empty text if it can."""
    if subnet.version == 6 or not subnet.overlaps(_TUNNEL_NETWORK):
        return ""
    return f"overlaps {TUNNEL_NETWORK}, which nodes behind NAT use: choose another one"


def data_path_port(swarms: Iterable[Swarm]) -> int:
    """Return the cluster's UDP port for VXLAN."""
    return next((swarm.data_path_port for swarm in swarms if swarm.data_path_port), DEFAULT_DATA_PATH_PORT)
