"""Session messages: the node's own object, the managers, and the roots to trust."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import msgspec

from skep.manager.dispatcher.node_sessions.shares import WEIGHT
from skep.model.networks.gossip import GossipKey
from skep.model.node import Node
from skep.model.swarm import Swarm
from skep.model.values.ids import NodeId, SessionId
from skep.wire import swarm_pb2 as pb
from skep.wire.convert.network import gossip_key_to_pb
from skep.wire.convert.node import node_to_pb


class ManagerPeer(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """A manager that nodes can register with, at ``addr`` (``ip:port``)."""

    node_id: NodeId
    addr: str


def managers_of(nodes: Iterable[Node], own: ManagerPeer) -> tuple[ManagerPeer, ...]:
    """Return all managers, always including this one: an engine drops every manager missing from a message."""
    known = {own.node_id: own}
    for node in nodes:
        if node.manager_status is not None and node.manager_status.addr:
            known[node.id] = ManagerPeer(node_id=node.id, addr=node.manager_status.addr)
    return tuple(sorted(known.values()))


def session_message(
    session_id: SessionId,
    node: Node,
    swarm: Swarm,
    managers: Sequence[ManagerPeer],
    keys: Sequence[GossipKey] = (),
    weights: Mapping[NodeId, int] = MappingProxyType({}),
) -> pb.SessionMessage:
    """Return the complete cluster data for a node.

    Args:
        keys: Gossip keys, for docker nodes only.
        weights: Weights of managers that should have more or fewer nodes than others.
    """
    return pb.SessionMessage(
        session_id=session_id,
        node=node_to_pb(node, swarm.data_path_port),
        managers=[
            pb.WeightedPeer(
                peer=pb.Peer(node_id=manager.node_id, addr=manager.addr),
                weight=weights.get(manager.node_id, WEIGHT),
            )
            for manager in managers
        ],
        network_bootstrap_keys=[gossip_key_to_pb(key) for key in keys],
        RootCA=swarm.tls_info.trust_root.encode(),
    )
