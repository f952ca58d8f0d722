"""Turns the outcomes of probes into findings.  Pure.  Every text names the port to open."""

from collections.abc import Iterable

from msgspec.structs import replace

from skep.dataplane.probe.packets import Outcome
from skep.model.networks.paths import (
    DETAIL_CHARACTERS_MAX,
    MTU_MIN,
    PathCheck,
    PathFinding,
    PathPeer,
    PathReport,
)

NO_TUNNEL = (
    ": one of the nodes is behind NAT, and there is no tunnel between them. Both need a WireGuard (a kernel with it, or"
    " wireguard-go), and between two NATs a third node has to relay"
)


def described_way(way: str) -> str:
    """Return the words for a way through NAT (``PathPeer.way``)."""
    return "through a tunnel" if way == "tunnel" else f"through tunnels by the {way}"


def overlay_finding(
    peer: PathPeer, outcome: Outcome, *, is_received: bool, tunnel_port: int = 0
) -> PathFinding:
    """Return the finding for small packets through VXLAN.

    ``is_received`` tells whether probes of the peer arrived here lately.  Those of a peer that has just failed did.
    ``tunnel_port``: the port on which the tunnel to it is opened, on the node that is not behind NAT.
    """
    port = _vxlan_port(peer)
    detail = ""
    if not outcome.arrived:
        detail = f"no response through VXLAN (UDP port {peer.vxlan_port}) from {_described(peer)}"
        if outcome.error:
            detail += f": {outcome.error}"
        elif is_received:
            detail += (
                "; its own probes arrived here until lately: the path to it is blocked, or it has just failed"
            )
        elif peer.way == "none":
            detail += NO_TUNNEL
        elif peer.way:
            detail += (
                f", {described_way(peer.way)}: open UDP port {tunnel_port} of nodes that are not behind NAT"
            )
    elif outcome.answered < outcome.sent:
        lost = outcome.sent - outcome.answered
        detail = f"{lost} of {outcome.sent} packets to {_described(peer)} through VXLAN were lost"
    return _finding(PathCheck.OVERLAY, port, outcome, detail)


def large_finding(peer: PathPeer, mtu: int, device_mtu: int, tried: int) -> PathFinding:
    """Return the finding for large packets.

    ``mtu`` is the path MTU, or 0 if not even ``MTU_MIN`` arrives.  ``tried`` is the number of packets sent.
    """
    detail = ""
    if not mtu:
        detail = (
            f"small packets arrive, those of {MTU_MIN} bytes do not, through VXLAN (UDP port {peer.vxlan_port}) to"
            f" {_described(peer)}: they are dropped on the path"
        )
    elif mtu < device_mtu and not peer.way:  # a tunnel always has a smaller one
        detail = (
            f"packets of up to {mtu} bytes arrive at {_described(peer)}, the device's MTU is {device_mtu}: overlays"
            " send no larger ones"
        )
    outcome = Outcome(sent=tried, answered=tried if mtu else 0)
    return _finding(PathCheck.LARGE_PACKETS, _vxlan_port(peer), outcome, detail)


def checksum_finding(peer: PathPeer, outcome: Outcome, *, is_off: bool) -> PathFinding:
    """Return the finding for packets whose checksum is left to the network card, unless offload ``is_off``."""
    detail = ""
    if is_off:
        detail = "the network card computed wrong checksums of packets inside VXLAN: checksum offload is switched off"
    if not outcome.arrived:
        detail = (
            f"packets with a checksum are lost on the path to {_described(peer)} through VXLAN (UDP port"
            f" {peer.vxlan_port}), with and without offload; those without a checksum arrive"
        )
    return _finding(PathCheck.CHECKSUM_OFFLOAD, _vxlan_port(peer), outcome, detail)


def port_finding(
    check: PathCheck, peer: PathPeer, address: str, port: int, outcome: Outcome, *, protocol: str
) -> PathFinding:
    """Return the finding for a port of the underlay."""
    detail = ""
    if not outcome.arrived:
        detail = (
            f"{protocol.upper()} port {port} of {peer.hostname} ({address}) cannot be used: {outcome.error}"
        )
    return _finding(check, f"{port}/{protocol}", outcome, detail)


def next_report(
    peer: PathPeer, findings: Iterable[PathFinding], mtu: int, before: PathReport | None
) -> PathReport:
    """Return the report of a new round.

    ``rounds`` counts how often the verdict was the same, starting from ``before``.
    """
    report = PathReport(peer=peer.node_id, findings=tuple(findings), mtu=mtu)
    if before is not None and _verdict(before) == _verdict(report):
        return replace(report, rounds=before.rounds + 1)
    return report


def is_changed(before: PathReport | None, report: PathReport) -> bool:
    """Return whether ``report`` has another verdict or MTU than ``before``, or its verdict has just settled."""
    if before is None or _verdict(before) != _verdict(report) or before.mtu != report.mtu:
        return True
    return report.is_settled and not before.is_settled


def _verdict(report: PathReport) -> frozenset[PathCheck]:
    return frozenset(one.check for one in report.failing)


def _finding(check: PathCheck, port: str, outcome: Outcome, detail: str) -> PathFinding:
    return PathFinding(
        check=check,
        port=port,
        sent=outcome.sent,
        lost=outcome.sent - outcome.answered,
        round_trip_ms=None if outcome.round_trip_s is None else round(outcome.round_trip_s * 1000, 3),
        detail=detail[:DETAIL_CHARACTERS_MAX],
    )


def _vxlan_port(peer: PathPeer) -> str:
    return f"{peer.vxlan_port}/udp"


def _described(peer: PathPeer) -> str:
    return f"{peer.hostname} ({peer.data_path})"
