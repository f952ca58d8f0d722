"""Paths between nodes: the targets of a node's probes, and its findings."""

from collections.abc import Iterable

from skep.model.networks.paths import (
    DETAIL_CHARACTERS_MAX,
    DiagnosticsRequest,
    NatPeer,
    NatTunnels,
    NetworkNames,
    PathCheck,
    PathFinding,
    PathPeer,
    PathReport,
    ProbeTargets,
)
from skep.model.values.ids import NetworkId, NodeId
from skep.wire import skep_pb2 as pb

_CHECKS = frozenset(PathCheck)
FINDINGS_MAX = 16
"""Largest number of findings in one report.  It exceeds the number of checks."""
PORT_CHARACTERS_MAX = 32
"""Maximum length of a port's text."""


def targets_to_pb(targets: ProbeTargets) -> pb.ProbeTargets:
    tunnels = targets.tunnels
    return pb.ProbeTargets(
        node=_peer_to_pb(targets.node),
        peers=map(_peer_to_pb, targets.peers),
        tunnels=_tunnels_to_pb(tunnels) if tunnels is not None else None,
    )


def targets_from_pb(message: pb.ProbeTargets) -> ProbeTargets:
    """Reverse ``targets_to_pb``."""
    return ProbeTargets(
        node=_peer_from_pb(message.node),
        peers=tuple(map(_peer_from_pb, message.peers)),
        tunnels=_tunnels_from_pb(message.tunnels) if message.HasField("tunnels") else None,
    )


def _tunnels_to_pb(tunnels: NatTunnels) -> pb.NatTunnels:
    return pb.NatTunnels(
        address=tunnels.address,
        is_behind_nat=tunnels.is_behind_nat,
        peers=[
            pb.NatPeer(
                node_id=peer.node_id,
                key=peer.key,
                port=peer.port,
                endpoint=peer.endpoint,
                addresses=peer.addresses,
            )
            for peer in tunnels.peers
        ],
        relayed=tunnels.relayed,
    )


def _tunnels_from_pb(message: pb.NatTunnels) -> NatTunnels:
    return NatTunnels(
        address=message.address,
        is_behind_nat=message.is_behind_nat,
        peers=tuple(
            NatPeer(
                node_id=NodeId(peer.node_id),
                key=peer.key,
                port=peer.port,
                endpoint=peer.endpoint,
                addresses=tuple(peer.addresses),
            )
            for peer in message.peers
        ),
        relayed=tuple(message.relayed),
    )


def diagnostics_to_pb(number: int, request: DiagnosticsRequest) -> pb.DiagnosticsRequest:
    """Convert a request.  ``number`` distinguishes the requests on one stream, and the reply repeats it."""
    return pb.DiagnosticsRequest(
        number=number,
        peers=map(_peer_to_pb, request.peers),
        throughput=request.throughput,
        names=[
            pb.NetworkNames(
                network_id=one.network_id,
                network=one.network,
                names=[
                    pb.NetworkNames.Name(name=name, addresses=addresses)
                    for name, addresses in sorted(one.names.items())
                ],
            )
            for one in request.names
        ],
    )


def diagnostics_from_pb(message: pb.DiagnosticsRequest) -> DiagnosticsRequest:
    return DiagnosticsRequest(
        peers=tuple(map(_peer_from_pb, message.peers)),
        throughput=message.throughput,
        names=tuple(
            NetworkNames(
                network_id=NetworkId(one.network_id),
                network=one.network,
                names={name.name: tuple(name.addresses) for name in one.names},
            )
            for one in message.names
        ),
    )


def reports_to_pb(reports: Iterable[PathReport]) -> list[pb.PathReport]:
    return [
        pb.PathReport(
            peer=report.peer,
            findings=map(_finding_to_pb, report.findings),
            mtu=report.mtu,
            throughput=report.throughput,
            rounds=report.rounds,
        )
        for report in reports
    ]


def reports_from_pb(messages: Iterable[pb.PathReport]) -> tuple[PathReport, ...]:
    """Convert reports.  Findings of unknown checks are left out, and texts are cut to their bounds."""
    return tuple(
        PathReport(
            peer=NodeId(message.peer),
            findings=tuple(
                _finding_from_pb(one) for one in message.findings[:FINDINGS_MAX] if one.check in _CHECKS
            ),
            mtu=message.mtu,
            throughput=message.throughput,
            rounds=message.rounds,
        )
        for message in messages
    )


def _finding_to_pb(finding: PathFinding) -> pb.PathFinding:
    return pb.PathFinding(
        check=finding.check.value,
        port=finding.port,
        sent=finding.sent,
        lost=finding.lost,
        round_trip_ms=finding.round_trip_ms,
        detail=finding.detail,
    )


def _finding_from_pb(message: pb.PathFinding) -> PathFinding:
    return PathFinding(
        check=PathCheck(message.check),
        port=message.port[:PORT_CHARACTERS_MAX],
        sent=message.sent,
        lost=message.lost,
        round_trip_ms=message.round_trip_ms if message.HasField("round_trip_ms") else None,
        detail=message.detail[:DETAIL_CHARACTERS_MAX],
    )


def _peer_to_pb(peer: PathPeer) -> pb.PathPeer:
    return pb.PathPeer(
        node_id=peer.node_id,
        hostname=peer.hostname,
        data_path=peer.data_path,
        vxlan_port=peer.vxlan_port,
        control=peer.control,
        gossip=peer.gossip,
        etcd=peer.etcd,
        encrypted=peer.encrypted,
        way=peer.way,
    )


def _peer_from_pb(message: pb.PathPeer) -> PathPeer:
    return PathPeer(
        node_id=NodeId(message.node_id),
        hostname=message.hostname,
        data_path=message.data_path,
        vxlan_port=message.vxlan_port,
        control=message.control,
        gossip=message.gossip,
        etcd=message.etcd,
        encrypted=message.encrypted,
        way=message.way,
    )
