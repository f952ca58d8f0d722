"""Reachability between nodes: the targets of a node's probes, and their results.

A manager sends each node its ``ProbeTargets``, and the node sends a ``PathReport`` for each peer.  Both nodes of a pair
are each other's targets, because a node responds to probes of its targets only.  Each node reports on the packets that
*it* sends, so a path that works in one direction only is detected.
"""

from collections.abc import Mapping
from enum import StrEnum

import msgspec

from skep.model.swarm import DEFAULT_DATA_PATH_PORT
from skep.model.values.ids import NetworkId, NodeId

DETAIL_CHARACTERS_MAX = 300
"""Longest detail of a finding that a node may report, in characters."""
PROBE_VNI = (1 << 24) - 1
"""VXLAN id of probes, the largest possible; never allocated to a network."""
MTU_MIN = 576
"""The smallest MTU that is probed: every IPv4 network supports it (RFC 791)."""
SETTLED_ROUNDS = 2
"""Consecutive rounds after which a result counts.  A single lost round does not."""


class PathPeer(msgspec.Struct, frozen=True, kw_only=True):
    """A node as a target of probes.  Empty addresses are not probed."""

    node_id: NodeId
    hostname: str
    data_path: str = ""
    """Underlay address of its VXLAN, without prefix length; empty for a docker node."""
    vxlan_port: int = DEFAULT_DATA_PATH_PORT
    """UDP port of its VXLAN, the cluster's data-path port."""
    control: str = ""
    """``192.0.2.1:2377`` or ``[fd09::1]:2377``, a manager's control port.  Empty if not probed."""
    etcd: str = ""
    """``192.0.2.1:2378``, the peer port of its etcd.  Empty if not probed."""
    gossip: str = ""
    """``192.0.2.1:7946`` of a docker node.  Empty if not probed."""
    encrypted: bool = False
    """Whether encrypted networks connect the two nodes, over UDP port ``vxlan_port + 10``."""
    way: str = ""
    """Way of the receiver of the targets to this node: empty without a tunnel, ``tunnel``, ``relay HOSTNAME``, or
    ``none`` if a tunnel that they need is missing.
    """


class NatPeer(msgspec.Struct, frozen=True, kw_only=True):
    """A node at the other end of a tunnel through NAT.

    ``endpoint``: its address outside the tunnel, or empty if it is behind NAT and has to send first.  ``addresses``:
    the addresses that are reached through this tunnel, its own first.  The others are of nodes that it relays to.
    """

    node_id: NodeId
    key: bytes
    port: int
    endpoint: str
    addresses: tuple[str, ...]


class NatTunnels(msgspec.Struct, frozen=True, kw_only=True):
    """The tunnels of one node.  ``address``: its own address on underlay and tunnels.

    ``relayed``: addresses of nodes behind NAT, between which this node passes packets on.  Empty if it never relays.
    ``left_out``: number of addresses that the node itself leaves out, because it has too many.
    """

    address: str
    is_behind_nat: bool = False
    peers: tuple[NatPeer, ...] = ()
    relayed: tuple[str, ...] = ()
    left_out: int = 0


class ProbeTargets(msgspec.Struct, frozen=True, kw_only=True):
    """All targets of one node.  Each message replaces the one before.

    ``node``: the node that receives this, whose ``data_path`` is the source address of its probes.  ``peers``: all
    others.
    """

    node: PathPeer
    peers: tuple[PathPeer, ...] = ()
    tunnels: NatTunnels | None = None
    """Tunnels through NAT, or None if the node needs none."""

    @property
    def addresses(self) -> frozenset[str]:
        """Return every address of the peers, without ports."""
        found = {peer.data_path for peer in self.peers}
        for peer in self.peers:
            found |= {
                place.rpartition(":")[0].strip("[]") for place in (peer.control, peer.etcd, peer.gossip)
            }
        return frozenset(found - {""})


class PathCheck(StrEnum):
    """A check between two nodes."""

    CONTROL = "control"
    """A manager's control port responds to a TLS client hello."""
    ETCD = "etcd"
    """A manager's etcd accepts connections on its peer port.  Probed by managers only."""
    OVERLAY = "overlay"
    """Small frames through VXLAN arrive and get responses."""
    LARGE_PACKETS = "large packets"
    """Unfragmented frames of at least ``MTU_MIN`` through VXLAN arrive and get responses."""
    CHECKSUM_OFFLOAD = "checksum offload"
    """Frames whose checksum is computed by the network card, and large TCP frames, arrive and get responses."""
    ENCRYPTED = "encrypted"
    """The other node responds on the port of encrypted networks."""
    GOSSIP = "gossip"
    """A docker node accepts connections on its gossip port."""
    NAMES = "names"
    """The names of a network resolve to the addresses in the store."""


class PathFinding(msgspec.Struct, frozen=True, kw_only=True):
    """One check in one direction: from the node that reports to the peer."""

    check: PathCheck
    port: str
    """Port and protocol, such as ``4789/udp``."""
    sent: int
    lost: int
    round_trip_ms: float | None = None
    """The shortest round trip, or None without a response."""
    detail: str = ""
    """At most ``DETAIL_CHARACTERS_MAX`` characters.  Explains a failure, or how its cause was fixed."""

    @property
    def is_failing(self) -> bool:
        """Return whether more than half of the packets were lost."""
        return self.lost * 2 > self.sent


class PathReport(msgspec.Struct, frozen=True, kw_only=True):
    """A node's results for one peer, of its latest round.

    ``rounds``: consecutive rounds with the same failing checks; a result is settled from ``SETTLED_ROUNDS`` on.
    """

    peer: NodeId
    findings: tuple[PathFinding, ...] = ()
    mtu: int = 0
    """Largest packet of the underlay that arrives unfragmented, or 0 if unknown."""
    throughput: int = 0
    """Bytes per second over TCP inside VXLAN, or 0 if not requested or failed."""
    rounds: int = 1

    @property
    def failing(self) -> tuple[PathFinding, ...]:
        """Return the failing checks of this round."""
        return tuple(one for one in self.findings if one.is_failing)

    @property
    def is_settled(self) -> bool:
        """Return whether enough rounds agree."""
        return self.rounds >= SETTLED_ROUNDS


class NetworkNames(msgspec.Struct, frozen=True, kw_only=True):
    """The addresses of service names on one network according to the store, possibly incomplete.

    ``names``: sorted addresses without prefix lengths, by name.
    """

    network_id: NetworkId
    network: str
    names: Mapping[str, tuple[str, ...]]


class DiagnosticsRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request to a node to run checks now.  ``throughput``: also measure the throughput."""

    peers: tuple[PathPeer, ...] = ()
    throughput: bool = False
    names: tuple[NetworkNames, ...] = ()


class DiagnosticsResult(msgspec.Struct, frozen=True, kw_only=True):
    """A node's results of a ``DiagnosticsRequest``.  ``error``: reason why they are missing or incomplete."""

    node_id: NodeId
    reports: tuple[PathReport, ...] = ()
    error: str = ""
