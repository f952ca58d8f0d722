"""Finds the cluster object, and the nodes and managers that have not applied its root CA yet."""

from skep.errors import FailedPrecondition, Unavailable
from skep.model.networks.data_planes import data_path_port
from skep.model.networks.reserved_ports import ReservedPorts, of_cluster
from skep.model.node import Node, NodeState
from skep.model.swarm import Swarm
from skep.model.values.ids import NodeId
from skep.security.trust import root_digest
from skep.store.interface import View
from skep.store.kinds import Revocation


def cluster_of(view: View) -> Swarm:
    """Return the cluster object.

    Raises:
        FailedPrecondition: The cluster object does not exist yet.
        Unavailable: The cluster object cannot be read.
    """
    for swarm in view.find(Swarm):
        return swarm
    for why in view.unreadable(Swarm).values():
        raise Unavailable(f"the cluster's settings cannot be read: {why}")
    raise FailedPrecondition("this node is not part of a swarm")


def known_cluster(view: View) -> Swarm | None:
    """Return the cluster object, or None if it does not exist yet or cannot be read."""
    return next(iter(view.find(Swarm)), None)


def reserved_ports_of(view: View) -> ReservedPorts:
    """Return the ports that the cluster itself uses."""
    return of_cluster(data_path_port(view.find(Swarm)), view.find(Node))


def node_name(view: View, node_id: NodeId) -> str:
    """Return the node's host name, or its id without one.  The record of its removal keeps the name."""
    if (node := view.lookup(Node, node_id)) is not None:
        return node.shown_name
    removed = view.lookup(Revocation, node_id)
    return (removed.hostname if removed is not None else "") or node_id


def etcds_behind(view: View) -> list[Node]:
    """Return the ready managers whose etcd trusts the previous root CA until its restart (``ca.peers``).

    If another rotation began, these etcds would reject the certificates of all other members, and the cluster would
    lose its leader.
    """
    swarm = cluster_of(view)
    return [
        node
        for node in view.find(Node)
        if node.status.state is NodeState.READY and has_etcd_behind(node, swarm)
    ]


def is_last_rotation_known(view: View) -> bool:
    """Return whether all ready nodes and their etcds trust the present root, so that another rotation may begin."""
    swarm = cluster_of(view)
    ready = (node for node in view.find(Node) if node.status.state is NodeState.READY)
    return not any(is_node_behind(node, swarm) or has_etcd_behind(node, swarm) for node in ready)


def is_node_behind(node: Node, swarm: Swarm) -> bool:
    """Return whether the node reports another trusted root than the present one.  Before its first session it reports
    none.
    """
    return node.description.tls_info.trust_root not in ("", swarm.tls_info.trust_root)


def has_etcd_behind(node: Node, swarm: Swarm) -> bool:
    """Return whether the node is a manager whose etcd trusts other roots in addition to, or instead of, the current
    one.
    """
    # Compute no digest for workers: there may be thousands.
    return node.has_joined_as_manager and node.peer_roots not in (
        "",
        root_digest(swarm.tls_info.trust_root.encode()),
    )
