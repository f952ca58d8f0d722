"""The ports of the underlay that a peer is asked at, and what is found there."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from skep.dataplane.plan.wireguard import PORT_OFFSET
from skep.dataplane.probe.findings import port_finding
from skep.dataplane.probe.knocking import Knocking
from skep.dataplane.probe.outcomes import Outcome
from skep.dataplane.probe.wishes import host_and_port
from skep.model.ids import NodeId
from skep.model.paths import PathCheck, PathFinding, PathPeer, ProbeTargets

NO_KEY = Outcome(sent=1, answered=0, error="the node publishes no WireGuard key, or this one has none")


class TunnelAddresses(Protocol):
    """The tunnels of encrypted networks (``wireguard.tunnels.Tunnels``)."""

    @property
    def namespace(self) -> Path: ...

    def address_of(self, node: NodeId) -> str: ...

    def port_of(self, node: NodeId) -> int: ...


class PortChecks:
    """A manager's ports, a docker node's gossip, the tunnel of encrypted networks: those that the peer has."""

    def __init__(self, knocking: Knocking, tunnels: TunnelAddresses) -> None:
        self._knocking = knocking
        self._tunnels = tunnels

    async def findings(self, wish: ProbeTargets | None, peer: PathPeer) -> Sequence[PathFinding]:
        """One after the other: most peers have one at most."""
        found = []
        if peer.control:
            address, port = host_and_port(peer.control)
            outcome = await self._knocking.hello(address, port)
            found.append(port_finding(PathCheck.CONTROL, peer, address, port, outcome, protocol="tcp"))
        if peer.etcd:
            # No hello: what etcd says of a connection alone is left out of the log (``store.etcd.output``).
            address, port = host_and_port(peer.etcd)
            outcome = await self._knocking.connect(address, port)
            found.append(port_finding(PathCheck.ETCD, peer, address, port, outcome, protocol="tcp"))
        if peer.gossip:
            address, port = host_and_port(peer.gossip)
            outcome = await self._knocking.connect(address, port)
            found.append(port_finding(PathCheck.GOSSIP, peer, address, port, outcome, protocol="tcp"))
        if peer.encrypted and peer.data_path and wish is not None and wish.node.data_path:
            address, port = (
                peer.data_path,
                self._tunnels.port_of(peer.node_id) or peer.vxlan_port + PORT_OFFSET,
            )
            inner = self._tunnels.address_of(peer.node_id)
            outcome = await self._knocking.tunnel(self._tunnels.namespace, inner) if inner else NO_KEY
            found.append(port_finding(PathCheck.ENCRYPTED, peer, address, port, outcome, protocol="udp"))
        return found
