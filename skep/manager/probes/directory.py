"""Derives from the store what nodes need to know about the nodes that they probe.  Pure."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec
from msgspec.structs import replace

from skep.manager.probes.nat import NatPlan, members_of
from skep.manager.probes.plan import ProbePlan
from skep.model.networks.addresses import joined
from skep.model.networks.data_planes import (
    RELAY_LABEL,
    is_docker_node,
    local_interface,
    nat_of,
    probes_paths,
    tunnel_key,
    underlay_of,
)
from skep.model.networks.paths import PathPeer, ProbeTargets
from skep.model.networks.reserved_ports import GOSSIP_PORT
from skep.model.node import Node, NodeState
from skep.model.values.ids import NetworkId, NodeId

GOSSIP_PEERS_MAX = 24
"""Docker nodes that one manager probes.  If there are more, each manager probes its share."""


class NodeDirectory(msgspec.Struct, frozen=True, kw_only=True):
    """All nodes that are up.

    ``gossiping`` are Docker nodes in order of their ids.  ``managers`` are Skep nodes that are managers.  ``nat`` has
    the tunnels of all nodes, including down ones.
    """

    peers: Mapping[NodeId, PathPeer]
    """Nodes that take part in probing."""
    gossiping: tuple[PathPeer, ...] = ()
    managers: tuple[NodeId, ...] = ()
    nat: NatPlan = NatPlan(())


def directory_of(nodes: Iterable[Node], vxlan_port: int, before: NatPlan | None = None) -> NodeDirectory:
    """Return the directory of the current nodes.  ``before``: an earlier plan of tunnels, kept if it is still right."""
    nodes = tuple(nodes)
    members = members_of(nodes)
    up = [node for node in nodes if node.status.state is NodeState.READY]
    ours = [node for node in nodes if _may_be_up(node) and probes_paths(node) and underlay_of(node)]
    return NodeDirectory(
        peers={node.id: _peer(node, vxlan_port) for node in ours},
        gossiping=tuple(
            PathPeer(
                node_id=node.id,
                hostname=node.description.hostname,
                gossip=joined(node.status.addr, GOSSIP_PORT),
            )
            for node in up
            if is_docker_node(node) and node.status.addr
        ),
        managers=tuple(node.id for node in ours if _control(node)),
        nat=before if before is not None and before.members == members else NatPlan(members),
    )


def _may_be_up(node: Node) -> bool:
    """Return whether the node is not known to be down.

    After a change of leader, nodes are unknown until they register.  Their peers still probe them, because a peer
    that loses its probes' results would send connections to a dead node (``dataplane/tables/unreachable.py``).
    """
    return node.status.state in (NodeState.READY, NodeState.UNKNOWN)


def changes_directory(old: Node, new: Node) -> bool:
    """Return whether a changed node changes the directory.  Called for each commit of each node."""
    if old.status is new.status and old.description is new.description:
        return (_manager_ports(old), _relays(old)) != (_manager_ports(new), _relays(new))
    return _relevant_fields(old) != _relevant_fields(new)


def _relevant_fields(node: Node) -> tuple[object, ...]:
    return (
        node.status,
        node.description.hostname,
        underlay_of(node),
        probes_paths(node),
        is_docker_node(node),
        _manager_ports(node),
        nat_of(node),
        tunnel_key(node),
        local_interface(node),
        _relays(node),
    )


def _relays(node: Node) -> str:
    return node.spec.labels.get(RELAY_LABEL, "")


def targets_for(
    id: NodeId,
    directory: NodeDirectory,
    plan: ProbePlan,
    encrypted: Callable[[NodeId], Sequence[NetworkId]],
) -> ProbeTargets | None:
    """Return the probe targets of a node, or None if it does not probe.

    ``encrypted`` returns the encrypted networks of a node.
    """
    own = directory.peers.get(id)
    if own is None:
        return None
    theirs = frozenset(encrypted(id))
    peers = []
    known = set()
    for peer_id in plan.peers(id):
        peer = directory.peers.get(peer_id)
        if peer is not None:
            is_encrypted = bool(theirs) and not theirs.isdisjoint(encrypted(peer_id))
            peer = replace(peer, encrypted=is_encrypted, way=directory.nat.way(id, peer_id))
            peers.append(_without_etcd(peer, own))
            known.add(peer_id)
    managers = managers_for(id, directory) if own.control else ()
    others = (manager for manager in managers if manager.node_id not in known)
    return ProbeTargets(
        node=own,
        peers=(*peers, *others, *_gossiping(id, directory)),
        tunnels=directory.nat.tunnels_for(id),
    )


def _without_etcd(peer: PathPeer, own: PathPeer) -> PathPeer:
    """Return the peer for a node.  Workers do not probe etcd's port, which may be closed to them."""
    return peer if own.control or not peer.etcd else replace(peer, etcd="")


def _gossiping(id: NodeId, directory: NodeDirectory) -> tuple[PathPeer, ...]:
    """Return the Docker nodes to probe.  Managers relay gossip to them, so other nodes do not probe them."""
    if id not in directory.managers:
        return ()
    if len(directory.gossiping) <= GOSSIP_PEERS_MAX:
        return directory.gossiping
    share = directory.managers.index(id)
    return directory.gossiping[share :: len(directory.managers)][:GOSSIP_PEERS_MAX]


def managers_for(id: NodeId, directory: NodeDirectory) -> tuple[PathPeer, ...]:
    """Return all other managers, for probes of only their manager ports."""
    own = directory.peers.get(id)
    managers = (directory.peers[manager] for manager in directory.managers if manager != id)
    return tuple(
        replace(peer, data_path="", etcd=peer.etcd if own is not None and own.control else "")
        for peer in managers
    )


def _peer(node: Node, vxlan_port: int) -> PathPeer:
    return PathPeer(
        node_id=node.id,
        hostname=node.description.hostname,
        data_path=underlay_of(node),
        vxlan_port=vxlan_port,
        control=_control(node),
        etcd=_manager_ports(node)[1],
    )


def _control(node: Node) -> str:
    return _manager_ports(node)[0]


def _manager_ports(node: Node) -> tuple[str, str]:
    """Return the manager's ports, which are empty until it has joined, because it does not listen before."""
    status = node.manager_status
    return (status.addr, status.peer_addr) if status is not None and node.has_joined_as_manager else ("", "")
