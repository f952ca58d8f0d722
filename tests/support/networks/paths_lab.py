"""Additions to ``overlay_lab`` for tests of probes: targets for all pairs, and servers at the probed ports."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from skep.dataplane.dataplane import DataPlane
from skep.model.networks.paths import PathCheck, PathPeer, PathReport, ProbeTargets
from tests.support.networks.overlay_lab import LabNode, OverlayLab
from tests.support.store.etcd_rig import peer_files

CONTROL_PORT, ETCD_PORT, GOSSIP_PORT = 2377, 2378, 7946


def a_peer(node: LabNode, *, has_ports: bool = False) -> PathPeer:
    """Return the node as a target of the other nodes.

    ``has_ports``: for a manager that carries encrypted networks, and gossips.
    """
    return PathPeer(
        node_id=node.id,
        hostname=f"host-{node.id}",
        data_path=node.underlay,
        control=f"{node.underlay}:{CONTROL_PORT}" if has_ports else "",
        etcd=f"{node.underlay}:{ETCD_PORT}" if has_ports else "",
        gossip=f"{node.underlay}:{GOSSIP_PORT}" if has_ports else "",
        encrypted=has_ports,
    )


def set_all_targets(lab: OverlayLab, networks: list[DataPlane], *, has_ports: bool = False) -> None:
    """Let every node probe every other node."""
    peers = [a_peer(node, has_ports=has_ports) for node in lab.nodes]
    for node, network in zip(lab.nodes, networks, strict=True):
        network.prober.set_targets(
            ProbeTargets(node=a_peer(node), peers=tuple(peer for peer in peers if peer.node_id != node.id))
        )


async def report_until(
    network: DataPlane, peer: LabNode, fits: Callable[[PathReport], bool], within_s: float = 30.0
) -> PathReport:
    """Return the first report on ``peer`` that ``fits``."""
    report: PathReport | None = None
    try:
        async with asyncio.timeout(within_s):
            while report is None or not fits(report):
                await asyncio.sleep(0.05)
                report = network.prober.reports.get(peer.id)
    except TimeoutError:
        raise AssertionError(f"no such report in {within_s:g} s, the last one: {report}") from None
    return report


def failing(report: PathReport) -> dict[PathCheck, str]:
    """Return the ports of failed checks, by check."""
    return {one.check: one.port for one in report.failing}


@asynccontextmanager
async def served_ports(lab: OverlayLab, root: Path) -> AsyncIterator[None]:
    """Serve TLS at each node's control port and etcd's port, and run a server at its gossip port."""
    files = peer_files(root)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certificate, files.key)
    context.load_verify_locations(files.roots)
    context.verify_mode = ssl.CERT_REQUIRED
    loop = asyncio.get_running_loop()
    servers: list[asyncio.Server] = []
    try:
        for node in lab.nodes:
            for port, tls in ((CONTROL_PORT, context), (ETCD_PORT, context), (GOSSIP_PORT, None)):
                listener = await node.namespaces.run(node.home, socket.create_server, (node.underlay, port))
                servers.append(await loop.create_server(asyncio.Protocol, sock=listener, ssl=tls))
        yield
    finally:
        for server in servers:
            server.close()
