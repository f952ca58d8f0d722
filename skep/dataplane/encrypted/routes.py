"""Where frames go and where they may come from: one plan, prepared for looking things up.  Never altered."""

import ipaddress
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from skep.dataplane.encrypted.peer import Peer
from skep.dataplane.encrypted.plan import PlannedSegment
from skep.model.ids import NodeId


class Carrier(NamedTuple):
    """One segment at work.

    ``tap``: descriptor; ``peers``: where frames to a MAC go; ``sources``: where those from a MAC come from, which may
    be any segment of the network; ``neighbours``: MAC by packed address.
    """

    vni: int
    tap: int
    peers: Mapping[bytes, Peer]
    sources: Mapping[bytes, Peer]
    neighbours: Mapping[bytes, bytes]


class Routes(NamedTuple):
    """All of it."""

    by_tap: Mapping[int, Carrier] = {}
    by_vni: Mapping[int, Carrier] = {}
    peers: Mapping[str, Peer] = {}
    """By underlay address."""
    piece: int = 1472
    """Bytes of a datagram's payload at most."""


def sources(segments: Iterable[PlannedSegment], peers: Mapping[NodeId, Peer]) -> dict[str, dict[bytes, Peer]]:
    """Whose each MAC address is, by the namespace of its network."""
    found: dict[str, dict[bytes, Peer]] = {}
    for segment in segments:
        here = found.setdefault(segment.namespace, {})
        here.update(
            (endpoint.mac, peers[endpoint.node_id])
            for endpoint in segment.endpoints
            if endpoint.node_id in peers
        )
    return found


def carrier(
    segment: PlannedSegment, tap: int, peers: Mapping[NodeId, Peer], sources: Mapping[bytes, Peer]
) -> Carrier:
    """``segment`` with its device and peers; endpoints of nodes that are no peers are left out."""
    known = [endpoint for endpoint in segment.endpoints if endpoint.node_id in peers]
    return Carrier(
        vni=segment.vni,
        tap=tap,
        peers={endpoint.mac: peers[endpoint.node_id] for endpoint in known},
        sources=sources,
        neighbours={
            ipaddress.ip_address(address).packed: endpoint.mac
            for endpoint in known
            for address in endpoint.addresses
        },
    )
