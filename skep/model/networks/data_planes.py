"""The two data planes of overlay networks: Docker Engine's and Skep's.

Docker Engines exchange the addresses of containers by gossip; skep nodes get them from the managers.  Both use VXLAN,
but neither gets the addresses of the other's containers.  So an overlay network belongs to one of the two, and its
tasks run on nodes of that kind (docs/decisions/0011).
"""

from collections.abc import Iterable
from typing import Final

from skep.model.network import Network
from skep.model.networks.addresses import is_of_a_machine, parsed
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
    a node runs on its manager's machine.
    """
    reported = node.description.engine.labels.get(DATA_PATH_LABEL, "")
    return usable_address(reported) or usable_address(node.status.addr, may_be_loopback=True)


def claimed_underlay(node: Node) -> str | None:
    """Return the underlay address that no other node may have while this one is up, or None."""
    if node.status.state is NodeState.DOWN or is_docker_node(node):
        return None
    underlay = underlay_of(node)
    return underlay if underlay and not parsed(underlay).is_loopback else None


def holder(claiming: Iterable[Node]) -> NodeId | None:
    """Return which of the nodes that claim an underlay address owns it, or None without nodes.

    The owner is the node that connects to the managers from this address, because a source address of a TCP connection
    cannot be forged.  Without such a node it is the node that joined first.
    """

    def order(node: Node) -> tuple[bool, str, str]:
        return node.status.addr != underlay_of(node), node.created_at, node.id

    return min(claiming, key=order).id if (claiming := list(claiming)) else None


def usable_address(text: str, *, may_be_loopback: bool = False) -> str:
    """Return the address ``text`` in canonical form, or an empty text if other machines cannot connect to it."""
    try:
        address = parsed(text)
    except ValueError:
        return ""
    is_usable = is_of_a_machine(address) or (may_be_loopback and address.is_loopback)
    return str(address) if is_usable else ""


def data_path_port(swarms: Iterable[Swarm]) -> int:
    """Return the cluster's UDP port for VXLAN."""
    return next((swarm.data_path_port for swarm in swarms if swarm.data_path_port), DEFAULT_DATA_PATH_PORT)
