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
is sent to all nodes behind NAT.  Nothing else depends on whether nodes are up: a node that is down keeps its tunnels.
"""

from collections.abc import Iterable
from hashlib import blake2b
from ipaddress import IPv4Interface

import msgspec

from skep.model.networks.addresses import parsed
from skep.model.networks.data_planes import (
    RELAY_LABEL,
    holder,
    is_docker_node,
    local_interface,
    nat_of,
    probes_paths,
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

_DIGEST_BITS = 64
"""Enough that no two nodes have the same digest."""


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """A node as the plan sees it.

    Args:
        address: Its underlay address, which is inside the tunnels for a node behind NAT.
        key: The key of its tunnels, or None if it cannot have any, for example because the address or the key belongs
            to another node.
        nat: The name of its NAT, or empty if others reach it.
        local: Its own address and subnet behind the NAT, or None if unknown.
        relays: Whether it relays before others (True) or never (False).  None if nothing is set.
    """

    id: NodeId
    hostname: str = ""
    address: str = ""
    key: PublicKey | None = None
    nat: str = ""
    local: IPv4Interface | None = None
    relays: bool | None = None
    is_up: bool = True


def members_of(nodes: Iterable[Node]) -> tuple[Member, ...]:
    """Return the nodes that may need tunnels: each with probes and an IPv4 address.

    Of the nodes with the same address, only its owner has tunnels (``data_planes.holder``).  Managers accept a key from
    one node only (``dispatcher.node_sessions.registration``).
    """
    found: list[Member] = []
    used: set[bytes] = set()
    claiming: dict[str, list[Node]] = {}
    for node in nodes:
        address = underlay_of(node) if probes_paths(node) and not is_docker_node(node) else ""
        if address and parsed(address).version == 4 and not parsed(address).is_loopback:
            claiming.setdefault(address, []).append(node)
    owners = {address: holder(here) for address, here in claiming.items()}
    pairs = ((node, address) for address, here in claiming.items() for node in here)
    for node, address in sorted(pairs, key=lambda pair: (pair[0].created_at, pair[0].id)):
        key = tunnel_key(node) if owners[address] == node.id else None
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
                local=local_interface(node),
                relays={"true": True, "false": False}.get(node.spec.labels.get(RELAY_LABEL, "")),
                is_up=node.status.state is not NodeState.DOWN,
            )
        )
    return tuple(found)


class NatPlan:
    """The tunnels of all nodes.  Those of one node are computed once, when they are first asked for."""

    def __init__(self, members: Iterable[Member]) -> None:
        self.members = tuple(members)
        self._members = {one.id: one for one in self.members}
        with_keys = sorted((one for one in self.members if one.key is not None), key=lambda one: one.id)
        self._behind = [one for one in with_keys if one.nat]
        reachable = [one for one in with_keys if not one.nat]
        self._relays = _candidates(reachable)
        self._digests = {one.id: _digest(one.id) for one in (*self._behind, *self._relays)}
        self._nearest = _Nearest(self._relays)
        self._to_reachable = {one.id: _peer(one, one.address) for one in reachable}
        """Peers of all nodes behind NAT, which share these objects."""
        self._to_behind = tuple(_peer(one, "") for one in self._behind)
        """Peers of all nodes that others reach."""
        self._addresses_behind = tuple(one.address for one in self._behind)
        self._tunnels: dict[NodeId, NatTunnels | None] = {}

    def tunnels_for(self, id: NodeId) -> NatTunnels | None:
        """Return a node's tunnels, or None if it needs none."""
        if id not in self._tunnels:
            self._tunnels[id] = self._planned(id)
        return self._tunnels[id]

    def _planned(self, id: NodeId) -> NatTunnels | None:
        own = self._members.get(id)
        if own is None or own.key is None or not self._behind:
            return None
        if own.nat:
            return NatTunnels(address=own.address, is_behind_nat=True, peers=self._peers_behind(own))
        relayed = self._addresses_behind if own in self._relays else ()
        return NatTunnels(address=own.address, peers=self._to_behind, relayed=relayed)

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
        return self._nearest.to(self._digests[a] ^ self._digests[b])

    def _peers_behind(self, own: Member) -> tuple[NatPeer, ...]:
        """Return the peers of a node behind NAT: all nodes that it can reach, and its neighbors behind the same NAT."""
        relayed: dict[NodeId, list[str]] = {}
        neighbors: list[NatPeer] = []
        for one in self._behind:
            if one.id == own.id:
                continue
            if one.nat == own.nat and _are_neighbors(own, one):
                neighbors.append(_peer(one, str(one.local.ip) if one.local is not None else ""))
            elif (relay := self.relay_of(own.id, one.id)) is not None:
                relayed.setdefault(relay.id, []).append(one.address)
        reached = dict(self._to_reachable)
        for id, addresses in relayed.items():
            reached[id] = msgspec.structs.replace(reached[id], addresses=(*reached[id].addresses, *addresses))
        return (*reached.values(), *neighbors)


class _Nearest:
    """Finds the relay whose digest is nearest to a number.  Only the leading bits that tell relays apart matter."""

    def __init__(self, relays: Iterable[Member]) -> None:
        by_digest = {_digest(one.id): one for one in relays}
        shifts = range(_DIGEST_BITS - 1, 0, -1)
        self._shift = next((n for n in shifts if len({one >> n for one in by_digest}) == len(by_digest)), 0)
        self._relays = {digest >> self._shift: one for digest, one in by_digest.items()}
        self._found: dict[int, Member | None] = {}

    def to(self, number: int) -> Member | None:
        """Return the nearest relay, or None without relays."""
        start = number >> self._shift
        if start not in self._found:
            nearest = min(self._relays, key=lambda one: start ^ one, default=None)
            self._found[start] = self._relays[nearest] if nearest is not None else None
        return self._found[start]


def _are_neighbors(one: Member, other: Member) -> bool:
    """Return whether both are behind the same NAT, and each has an address in the other's subnet there."""
    if not one.nat or one.nat != other.nat or one.local is None or other.local is None:
        return False
    return one.local.ip in other.local.network and other.local.ip in one.local.network


def _candidates(reachable: Iterable[Member]) -> tuple[Member, ...]:
    willing = [one for one in reachable if one.relays is not False and one.is_up]
    preferred = [one for one in willing if one.relays]
    return tuple(sorted(preferred or willing, key=lambda one: _digest(one.id))[:RELAYS_MAX])


def _peer(member: Member, endpoint: str) -> NatPeer:
    assert member.key is not None, "members without a key have no tunnels"
    return NatPeer(
        node_id=member.id,
        key=member.key.key,
        port=member.key.port,
        endpoint=endpoint,
        addresses=(member.address,),
    )


def _digest(id: NodeId) -> int:
    return int.from_bytes(blake2b(id.encode(), digest_size=_DIGEST_BITS // 8).digest(), "big")
