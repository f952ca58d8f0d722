"""Plans the WireGuard tunnels of nodes behind NAT.  Pure.

A node behind NAT can open connections, but no other node can open one to it.  It therefore keeps a tunnel to each node
that can be reached, and these tunnels carry packets in both directions.  Its address inside the tunnels is its underlay
address.  Two nodes have exactly one way to each other:

* Nodes that others reach: directly, without a tunnel.
* One of them behind NAT: the tunnel between them.
* Both behind the same NAT: a tunnel between their own addresses there.
* Both behind different NATs: through the tunnels that both have to one relay.  A relay is never behind NAT, so there is
  exactly one, and packets cannot go in circles.

The relay of a pair is the candidate whose digest is nearest to both nodes' digests.  So managers agree on it without
communication, and if a relay is lost, only its own pairs move.  There are few candidates, because every change of them
is sent to all nodes behind NAT.
"""

from collections.abc import Iterable, Mapping
from hashlib import blake2b

import msgspec

from skep.model.networks.addresses import parsed
from skep.model.networks.data_planes import (
    RELAY_LABEL,
    is_docker_node,
    local_address,
    nat_of,
    tunnel_key,
    underlay_of,
)
from skep.model.networks.paths import NatPeer, NatTunnels
from skep.model.networks.wireguard import PublicKey
from skep.model.node import Node, NodeState
from skep.model.values.ids import NodeId

RELAYS_MAX = 8
"""Candidates for relays.  Enough to share the load and to survive losses, and few enough to be stable."""

DIRECT, TUNNEL, NO_WAY = "", "tunnel", "none"
"""Ways between two nodes.  See ``PathPeer.way``."""


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """A node as the plan sees it.

    Args:
        address: Its underlay address, which is inside the tunnels for a node behind NAT.
        key: The key of its tunnels, or None if it cannot have any.
        nat: The name of its NAT, or empty if others reach it.
        local: Its own address on the network behind the NAT, or empty if unknown.
        relays: Whether it relays before others (True) or never (False).  None if nothing is set.
    """

    id: NodeId
    hostname: str = ""
    address: str = ""
    key: PublicKey | None = None
    nat: str = ""
    local: str = ""
    relays: bool | None = None


def members_of(nodes: Iterable[Node]) -> tuple[Member, ...]:
    """Return the nodes that may need tunnels: Skep nodes that are not down, and have an IPv4 address.

    If nodes publish the same key, only the first to join may use it, because WireGuard identifies a peer by its
    key only.
    """
    found: list[Member] = []
    used: set[bytes] = set()
    for node in sorted(nodes, key=lambda one: (one.created_at, one.id)):
        address = underlay_of(node)
        if node.status.state is NodeState.DOWN or is_docker_node(node) or not address:
            continue
        if parsed(address).version == 6 or parsed(address).is_loopback:
            continue
        key = tunnel_key(node)
        if key is not None and key.key in used:
            key = None
        used |= {key.key} if key is not None else set()
        found.append(
            Member(
                id=node.id,
                hostname=node.description.hostname,
                address=address,
                key=key,
                nat=nat_of(node),
                local=local_address(node),
                relays={"true": True, "false": False}.get(node.spec.labels.get(RELAY_LABEL, "")),
            )
        )
    return tuple(found)


class NatPlan:
    """The tunnels of all nodes."""

    def __init__(self, members: Iterable[Member]) -> None:
        self._members = {one.id: one for one in members}
        with_keys = [one for one in self._members.values() if one.key is not None]
        self._behind = sorted((one for one in with_keys if one.nat), key=lambda one: one.id)
        self._open = sorted((one for one in with_keys if not one.nat), key=lambda one: one.id)
        self._relays = _candidates(self._open)
        self._digests = {one.id: _digest(one.id) for one in (*self._behind, *self._relays)}

    def tunnels_for(self, id: NodeId) -> NatTunnels | None:
        """Return a node's tunnels, or None if it needs none."""
        own = self._members.get(id)
        if own is None or own.key is None or not self._behind:
            return None
        if own.nat:
            return NatTunnels(address=own.address, is_behind_nat=True, peers=self._peers_behind(own))
        return NatTunnels(
            address=own.address,
            peers=tuple(_peer(one, "", (one.address,)) for one in self._behind),
            relayed=tuple(one.address for one in self._behind) if own in self._relays else (),
        )

    def way(self, a: NodeId, b: NodeId) -> str:
        """Return the way between two nodes, which is the same in both directions."""
        one, other = self._members.get(a), self._members.get(b)
        if one is None or other is None or not (one.nat or other.nat):
            return DIRECT
        if one.key is None or other.key is None:
            return NO_WAY
        if not (one.nat and other.nat) or _are_neighbors(one, other):
            return TUNNEL
        relay = self.relay_of(one.id, other.id)
        return f"relay {relay.hostname or relay.id}" if relay is not None else NO_WAY

    def relay_of(self, a: NodeId, b: NodeId) -> Member | None:
        """Return the relay of two nodes behind different NATs, or None if no node can relay."""
        pair = self._digests[a] ^ self._digests[b]
        return min(self._relays, key=lambda one: pair ^ self._digests[one.id], default=None)

    def _peers_behind(self, own: Member) -> tuple[NatPeer, ...]:
        """Return the peers of a node behind NAT: all nodes that it can reach, and its neighbors behind the same NAT."""
        relayed: dict[NodeId, list[str]] = {}
        neighbors: list[NatPeer] = []
        for one in self._behind:
            if one.id == own.id:
                continue
            if _are_neighbors(own, one):
                neighbors.append(_peer(one, one.local, (one.address,)))
            elif (relay := self.relay_of(own.id, one.id)) is not None:
                relayed.setdefault(relay.id, []).append(one.address)
        reached = (_peer(one, one.address, (one.address, *relayed.get(one.id, ()))) for one in self._open)
        return (*reached, *neighbors)


def ways(plan: NatPlan, own: NodeId, peers: Iterable[NodeId]) -> Mapping[NodeId, str]:
    """Return the way from ``own`` to each of ``peers``."""
    return {peer: plan.way(own, peer) for peer in peers}


def _are_neighbors(one: Member, other: Member) -> bool:
    """Return whether both are behind the same NAT, and know addresses of each other there."""
    return bool(one.nat and one.nat == other.nat and one.local and other.local)


def _candidates(reachable: Iterable[Member]) -> tuple[Member, ...]:
    willing = [one for one in reachable if one.relays is not False]
    preferred = [one for one in willing if one.relays]
    return tuple(sorted(preferred or willing, key=lambda one: _digest(one.id))[:RELAYS_MAX])


def _peer(member: Member, endpoint: str, addresses: tuple[str, ...]) -> NatPeer:
    assert member.key is not None, "members without a key have no tunnels"
    return NatPeer(
        node_id=member.id,
        key=member.key.key,
        port=member.key.port,
        endpoint=endpoint,
        addresses=addresses,
    )


def _digest(id: NodeId) -> int:
    return int.from_bytes(blake2b(id.encode(), digest_size=8).digest(), "big")
