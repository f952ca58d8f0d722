"""Paths between nodes: whom a node is to probe, and what it found.

A manager tells each node a ``PathWish``; the node answers with a ``PathReport`` for each peer.  Pairs are told to both
ends: a node answers the probes of those it knows only.  Each end reports what *it* sends, so a path that is open in
one direction only is seen.
"""

from collections.abc import Mapping
from enum import StrEnum

import msgspec

from skep.model.ids import NetworkId, NodeId
from skep.model.swarm import DEFAULT_DATA_PATH_PORT

DETAIL_CHARACTERS_MAX = 300
PROBE_VNI = (1 << 24) - 1
"""VXLAN id of the probes between nodes, the largest there is; no network is given it."""
MTU_MIN = 576
"""The smallest MTU that is looked for: what every IPv4 network carries (RFC 791)."""
SETTLED_ROUNDS = 2
"""Rounds in a row after which a verdict counts: one lost round is nothing yet."""


class PathPeer(msgspec.Struct, frozen=True, kw_only=True):
    """A node as others probe it.  Empty addresses are not asked."""

    node_id: NodeId
    hostname: str
    data_path: str = ""
    """Underlay address that its VXLAN leaves from and arrives at, without a length; empty of a docker node."""
    vxlan_port: int = DEFAULT_DATA_PATH_PORT
    """UDP; the cluster's data-path port."""
    control: str = ""
    """``192.0.2.1:2377`` or ``[fd09::1]:2377``; empty: no manager, or not to be asked."""
    etcd: str = ""
    """``192.0.2.1:2378``, where managers reach another one's etcd; empty: not to be asked."""
    gossip: str = ""
    """``192.0.2.1:7946`` of a docker node; empty: not to be asked."""
    encrypted: bool = False
    """Whether both nodes carry encrypted networks together, by UDP port ``vxlan_port + 10``."""


class PathWish(msgspec.Struct, frozen=True, kw_only=True):
    """All that a node is told of paths; the latest wins.

    ``node``: the node itself, whose ``data_path`` its probes leave from; ``peers``: without itself.
    """

    node: PathPeer
    peers: tuple[PathPeer, ...] = ()


class PathCheck(StrEnum):
    """What is checked between two nodes."""

    CONTROL = "control"
    """A TLS hello is answered on a manager's control port."""
    ETCD = "etcd"
    """A manager's etcd takes connections on its peer port.  Asked by managers alone."""
    OVERLAY = "overlay"
    """Small frames come through VXLAN and are answered."""
    LARGE_PACKETS = "large packets"
    """So do frames of at least ``MTU_MIN``, unfragmented."""
    CHECKSUM_OFFLOAD = "checksum offload"
    """So do frames whose checksum is left to the network card, and TCP's large ones."""
    ENCRYPTED = "encrypted"
    """The other's forwarder of encrypted networks answers."""
    GOSSIP = "gossip"
    """A docker node takes connections on its gossip port."""
    NAMES = "names"
    """The names of a network are those that the store says."""


class PathFinding(msgspec.Struct, frozen=True, kw_only=True):
    """One check in one direction: from the node that reports to the peer."""

    check: PathCheck
    port: str
    """``4789/udp``."""
    sent: int
    lost: int
    round_trip_ms: float | None = None
    """The shortest one; None: nothing came back."""
    detail: str = ""
    """A sentence of at most ``DETAIL_CHARACTERS_MAX``; not empty where it fails, and where it was put right."""

    @property
    def is_failing(self) -> bool:
        """More than half was lost."""
        return self.lost * 2 > self.sent


class PathReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a node found of one peer, in its latest round.

    ``rounds``: how many in a row failed in the same checks, or in none; a verdict is settled from ``SETTLED_ROUNDS``
    on.
    """

    peer: NodeId
    findings: tuple[PathFinding, ...] = ()
    mtu: int = 0
    """Largest packet of the underlay that arrives in one piece; 0: unknown."""
    throughput: int = 0
    """Bytes per second over TCP inside VXLAN; 0: not asked for, or it failed."""
    rounds: int = 1

    @property
    def failing(self) -> tuple[PathFinding, ...]:
        return tuple(one for one in self.findings if one.is_failing)

    @property
    def is_settled(self) -> bool:
        return self.rounds >= SETTLED_ROUNDS


class NetworkNames(msgspec.Struct, frozen=True, kw_only=True):
    """What names of services stand for on one network, as the store says; perhaps not all of them.

    ``names``: name -> addresses without lengths, sorted.
    """

    network_id: NetworkId
    network: str
    names: Mapping[str, tuple[str, ...]]


class Examination(msgspec.Struct, frozen=True, kw_only=True):
    """What a node is asked to look at now.  ``throughput``: to measure that as well."""

    peers: tuple[PathPeer, ...] = ()
    throughput: bool = False
    names: tuple[NetworkNames, ...] = ()


class Examined(msgspec.Struct, frozen=True, kw_only=True):
    """What one node found when it was asked to; ``error``: why there is nothing, or something is missing."""

    node_id: NodeId
    reports: tuple[PathReport, ...] = ()
    error: str = ""
