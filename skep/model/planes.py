"""The two data planes of overlay networks: Docker Engines' own, and ours.

Docker Engines tell each other by gossip which container has which address; skep nodes are told by the managers.
Both use VXLAN, but neither hears of the other's containers: so an overlay network belongs to one of the two, and its
tasks run on nodes of that kind (docs/decisions/0011).
"""

from collections.abc import Iterable
from typing import Final

from skep.model.addresses import is_of_a_machine, parsed
from skep.model.ids import NodeId
from skep.model.network import Network
from skep.model.node import Node, NodeState
from skep.model.swarm import DEFAULT_DATA_PATH_PORT, Swarm

DOCKER: Final = "docker"
SKEP: Final = "skep"
PLANES: Final = frozenset({DOCKER, SKEP})

PLANE_OPTION: Final = "skep.data-plane"
"""Driver option or label of a network: the plane it shall belong to; in the driver's state: the one it does."""

NODE_LABEL: Final = "skep.node"
"""Engine label by which a skep node says what it is; Docker Engines do not know it."""

DATA_PATH_LABEL: Final = "skep.data-path-addr"
"""Engine label by which a skep node says which of its addresses VXLAN leaves from and arrives at."""

REFUSED_DATA_PATH_LABEL: Final = "skep.data-path-addr.refused"
"""What a manager makes of that label when the address is another node's."""

PATHS_LABEL: Final = "skep.paths"
"""Engine label by which a skep node says that it probes others and answers their probes."""

NODE_DRIVERS: Final = frozenset({"host", "bridge", "null", "none", "macvlan", "ipvlan"})
"""Drivers of networks that live on one node."""


def driver_of(network: Network) -> str:
    """The driver's name: as allocated, else as wished."""
    wished = network.spec.driver_configuration
    return network.driver_state.name or (wished.name if wished else "") or "overlay"


def is_overlay(network: Network) -> bool:
    """Whether the cluster gives out addresses on the network, and a data plane carries it from node to node."""
    return driver_of(network) not in NODE_DRIVERS


def wished_plane(network: Network) -> str:
    """The plane that the user named when the network was made; empty: none."""
    driver = network.spec.driver_configuration
    named = driver.options.get(PLANE_OPTION, "") if driver is not None else ""
    return named or network.spec.labels.get(PLANE_OPTION, "")


def plane_of(network: Network) -> str:
    """The plane that the network belongs to; empty: the first task on it decides."""
    return network.driver_state.options.get(PLANE_OPTION, "") or wished_plane(network)


def is_docker_node(node: Node) -> bool:
    """Whether the node is a Docker Engine.  A node that has not described itself yet is none.

    What it joined as counts, not what it says: docker nodes are sent keys that skep nodes never have.
    """
    engine = node.description.engine
    if node.certificate is not None and node.certificate.plane:
        return bool(engine.engine_version) and node.certificate.plane == DOCKER
    return bool(engine.engine_version) and NODE_LABEL not in engine.labels


def probes_paths(node: Node) -> bool:
    """Whether the node takes part in the probes between nodes."""
    return PATHS_LABEL in node.description.engine.labels


def plane_of_node(node: Node) -> str:
    """The plane that overlay networks have on the node."""
    return DOCKER if is_docker_node(node) else SKEP


def underlay_of(node: Node) -> str:
    """The address that the node's VXLAN leaves from: as it says itself, else the one it connects from.

    Empty: neither is an address that other machines reach it by.  One that connects over the loopback is on the
    machine of its manager, and keeps that address.
    """
    said = node.description.engine.labels.get(DATA_PATH_LABEL, "")
    return usable_address(said) or usable_address(node.status.addr, may_be_loopback=True)


def claimed_underlay(node: Node) -> str | None:
    """The address that no other node may have for its VXLAN while this one is up; None: it keeps none from others."""
    if node.status.state is NodeState.DOWN or is_docker_node(node):
        return None
    underlay = underlay_of(node)
    return underlay if underlay and not parsed(underlay).is_loopback else None


def holder(claiming: Iterable[Node]) -> NodeId | None:
    """Whose an address is that all of ``claiming`` have for their VXLAN; None: nobody claims it.

    It is the node's that connects from there, which nobody can pretend; else that of the one that joined first.
    """

    def order(node: Node) -> tuple[bool, str, str]:
        return node.status.addr != underlay_of(node), node.created_at, node.id

    return min(claiming, key=order).id if (claiming := list(claiming)) else None


def usable_address(text: str, *, may_be_loopback: bool = False) -> str:
    """``text`` in the usual spelling; empty: it is no address that other machines reach one by."""
    try:
        address = parsed(text)
    except ValueError:
        return ""
    is_usable = is_of_a_machine(address) or (may_be_loopback and address.is_loopback)
    return str(address) if is_usable else ""


def data_path_port(swarms: Iterable[Swarm]) -> int:
    """The cluster's UDP port for VXLAN."""
    return next((swarm.data_path_port for swarm in swarms if swarm.data_path_port), DEFAULT_DATA_PATH_PORT)
