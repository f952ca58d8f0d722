"""Where frames go and where they may come from: one plan, prepared for looking things up.  Never altered."""

import ipaddress
from collections.abc import Mapping
from typing import NamedTuple

from skep.model.ids import NodeId
from skep.node.network.encrypted.peer import Peer
from skep.node.network.encrypted.plan import PlannedSegment


class Carrier(NamedTuple):
    """One segment at work.  ``tap``: descriptor; ``peers`` by MAC; ``neighbours``: MAC by packed address."""

    vni: int
    tap: int
    peers: Mapping[bytes, Peer]
    neighbours: Mapping[bytes, bytes]


class Routes(NamedTuple):
    """All of it."""

    by_tap: Mapping[int, Carrier] = {}
    by_vni: Mapping[int, Carrier] = {}
    peers: Mapping[str, Peer] = {}
    """By underlay address."""
    piece: int = 1472
    """Bytes of a datagram's payload at most."""


def carrier(segment: PlannedSegment, tap: int, peers: Mapping[NodeId, Peer]) -> Carrier:
    """``segment`` with its device and peers; endpoints of nodes that are no peers are left out."""
    known = [endpoint for endpoint in segment.endpoints if endpoint.node_id in peers]
    return Carrier(
        vni=segment.vni,
        tap=tap,
        peers={endpoint.mac: peers[endpoint.node_id] for endpoint in known},
        neighbours={
            ipaddress.ip_address(address).packed: endpoint.mac
            for endpoint in known
            for address in endpoint.addresses
        },
    )
