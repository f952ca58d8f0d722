"""Probes the data path to each peer through VXLAN, and keeps the measurements.

The order matters: first small packets, then the path MTU if these arrive, then packets with a checksum, of a size that
arrives.
"""

import asyncio
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress

import msgspec
import structlog

from skep.aio.clock import Clock
from skep.dataplane.netns.kernel.namespaces import Namespaces
from skep.dataplane.plan.nat import port_towards
from skep.dataplane.plan.overlay import Underlay
from skep.dataplane.plan.probe import IP_UDP_BYTES, PORT, address_of, number_of, overhead, reached
from skep.dataplane.probe.findings import checksum_finding, large_finding, overlay_finding
from skep.dataplane.probe.measurements import (
    TRIALS,
    Measurements,
    Offload,
    after_success,
    after_trials,
    initial_range,
    is_suspect,
    narrowed,
    next_sizes,
    path_mtu,
    recheck_sizes,
)
from skep.dataplane.probe.namespace import ProbeNamespace
from skep.dataplane.probe.packets import Outcome, PeerMeasurements
from skep.dataplane.probe.probe_socket import ProbeSocket, Sockets
from skep.dataplane.probe.tcp_transfer import BYTES_MAX, Sink, Transfer, open_sender, transfer
from skep.errors import SkepError
from skep.model.networks.paths import PathFinding, PathPeer, ProbeTargets
from skep.model.networks.reserved_ports import tunnel_port
from skep.model.values.ids import NodeId

log = structlog.get_logger()

SMALL_TRIES = 3
"""Number of packets in a periodic probe.  More than one, because a busy network loses a packet at times."""
THOROUGH_TRIES = 10
"""Number of packets in a probe that a person has requested.  It shows a loss of 10 %."""
REQUESTED_S = 25.0
"""Seconds within which a peer's requests must arrive here.  A peer sends them every ten seconds."""
CHECK_BYTES = 1 << 18
"""Bytes of a TCP transfer that tests whether large segments arrive.  Large enough for many segments."""
_TRIAL_TRIES = 5
"""Number of packets that decide whether packets with checksums by the network card arrive."""


class DataPath:
    """Probes and measurements of one node's data path.

    Args:
        numbers: Returns 64 random bits.
        wireguard_port: The configured port of WireGuard, or 0.
    """

    def __init__(
        self,
        namespace: ProbeNamespace,
        namespaces: Namespaces,
        clock: Clock,
        numbers: Callable[[], int],
        wireguard_port: int = 0,
    ) -> None:
        self._wireguard_port = wireguard_port
        self._namespace = namespace
        self._namespaces = namespaces
        self._probe_socket = ProbeSocket(clock, self.own_measurements, numbers)
        self._clock = clock
        self._targets: ProbeTargets | None = None
        self._underlay: Underlay | None = None
        self._addresses: dict[NodeId, str] = {}
        self._sockets: Sockets | None = None
        self._sockets_of: tuple[str, int] | None = None
        self._server: asyncio.Server | None = None
        self._connections: set[Sink] = set()
        self._applying = asyncio.Lock()
        self._testing = asyncio.Lock()
        self._has_offloads: bool | None = None
        self._verified_by_tcp: set[NodeId] = set()
        self.failure = ""
        """Reason why no peer can be probed at present, or empty if probing works."""
        self.measured = Measurements()
        self.offload = Offload()

    def own_measurements(self) -> PeerMeasurements:
        """Return the measurements that responses carry: the MTU of this node's device, and all path MTUs that are
        smaller.
        """
        mtu = self._underlay.mtu if self._underlay is not None else 0
        own = self.measured.own
        return PeerMeasurements(mtu, {number_of(id): found for id, found in own.items() if 0 < found < mtu})

    def underlay_between(self, node: NodeId, nodes: Collection[NodeId], underlay: Underlay) -> Underlay:
        """Return ``underlay`` with the MTU of the paths between ``nodes``, which include this ``node``."""
        mtu = path_mtu(self.measured, nodes, node, underlay.mtu)
        return msgspec.structs.replace(underlay, mtu=mtu, offloads=False if self.offload.is_off else None)

    # --- namespace ------------------------------------------------------------------------------------------------

    async def apply(self, targets: ProbeTargets | None) -> str:
        """Probe ``targets`` from now on and respond to them.  Return why that is impossible, or an empty text."""
        async with self._applying:
            self._targets = targets
            self._drop_removed_peers()
            try:
                if targets is None or not targets.node.data_path:
                    self.close()
                    self._underlay = None
                    await self._namespace.remove()
                else:
                    await self._apply(targets)
            except (SkepError, OSError) as error:
                self.failure = str(error)
            else:
                self.failure = ""
            return self.failure

    async def _apply(self, targets: ProbeTargets) -> None:
        self._underlay = await self._namespace.apply(targets, offloads=self._has_offloads)
        if self._has_offloads is None:
            # The device's setting shows the result of an earlier process.  A new device leaves checksums to the card.
            self._has_offloads = await self._namespace.has_offloads()
            self.offload = Offload(is_off=not self._has_offloads)
        address = address_of(targets.node.node_id)
        if self._sockets_of != (address, self._namespace.identity()):
            self.close()
            self._sockets = await self._namespace.sockets(address)
            self._probe_socket.attach(self._sockets)
            self._server = await asyncio.get_running_loop().create_server(
                lambda: Sink(self._probe_socket.is_peer, self._connections), sock=self._sockets.listening
            )
            self._sockets_of = (address, self._namespace.identity())
        found = reached(targets)
        self._addresses = {peer.node_id: address for address, peer in found.items()}
        self._probe_socket.set_peers(found.keys())

    def _drop_removed_peers(self) -> None:
        peers = {peer.node_id for peer in self._targets.peers} if self._targets is not None else set()
        self.measured = Measurements(
            {id: mtu for id, mtu in self.measured.own.items() if id in peers},
            {id: reported for id, reported in self.measured.peers.items() if id in peers},
        )
        self._verified_by_tcp &= peers
        self._addresses = {id: address for id, address in self._addresses.items() if id in peers}

    def close(self) -> None:
        """Stop probing and responding.  The device stays."""
        self._probe_socket.detach()
        for one in tuple(self._connections):
            one.abort()
        if self._server is not None:
            self._server.close()
        if self._sockets is not None:
            self._sockets.close()
        self._sockets, self._sockets_of, self._server = None, None, None

    # --- probes -----------------------------------------------------------------------------------------------

    async def findings(self, peer: PathPeer, *, is_thorough: bool) -> Sequence[PathFinding]:
        """Probe ``peer`` and return the findings.  Empty if it has no data path or is not a target yet."""
        address, underlay = self._addresses.get(peer.node_id), self._underlay
        if self.failure and peer.data_path:
            nothing = Outcome(sent=1, answered=0, error=self.failure)
            return (overlay_finding(peer, nothing, is_received=False),)
        if address is None or underlay is None:
            return ()
        tries = THOROUGH_TRIES if is_thorough else SMALL_TRIES
        small = await self._probe_socket.probe(address, tries=tries, enough=tries)
        found = [
            overlay_finding(
                peer,
                small,
                is_received=self._probe_socket.received_within(address, REQUESTED_S),
                tunnel_port=self._port_of_tunnel(peer),
            ),
        ]
        if not small.arrived:
            self._verified_by_tcp.discard(peer.node_id)
            return found
        mtu, tried = await self._mtu(peer, address, underlay)
        self._record(peer.node_id, mtu, small.peer)
        found.append(large_finding(peer, mtu, underlay.mtu, tried))
        if mtu:
            outcome = await self._checksum_outcome(peer, address, is_thorough=is_thorough)
            found.append(checksum_finding(peer, outcome, is_off=self.offload.is_off))
        return found

    def _port_of_tunnel(self, peer: PathPeer) -> int:
        tunnels = self._targets.tunnels if self._targets is not None else None
        return port_towards(tunnels, peer.data_path, tunnel_port(peer.vxlan_port, self._wireguard_port))

    async def throughput(self, peer: PathPeer) -> int:
        """Measure the TCP throughput to ``peer`` in bytes per second.  0 if packets do not arrive."""
        address = self._addresses.get(peer.node_id)
        return (await self._transfer(peer, address, BYTES_MAX)).per_s if address is not None else 0

    def _record(self, peer: NodeId, mtu: int, reported: PeerMeasurements | None) -> None:
        own = {**self.measured.own, peer: mtu} if mtu else self.measured.own
        peers = self.measured.peers if reported is None else {**self.measured.peers, peer: reported}
        if peer in self._addresses:  # it may have been removed meanwhile
            self.measured = Measurements(own, peers)

    async def _mtu(self, peer: PathPeer, address: str, underlay: Underlay) -> tuple[int, int]:
        """Return the path MTU (0 if less than ``MTU_MIN``), and the number of sizes tried."""
        known, tried = initial_range(underlay.mtu), 0
        before = min(self.measured.own.get(peer.node_id, 0), underlay.mtu)
        if before:
            tried_sizes = recheck_sizes(before, underlay.mtu)
            arrived = await self._probe_sizes(address, underlay, tried_sizes)
            tried = len(tried_sizes)
            if arrived and max(arrived) == before:
                return before, tried
            known = narrowed(known, tried_sizes, arrived) if arrived else known
        while tried_sizes := next_sizes(known):
            arrived = await self._probe_sizes(address, underlay, tried_sizes)
            tried += len(tried_sizes)
            known = narrowed(known, tried_sizes, arrived)
        return known.arrives, tried

    async def _probe_sizes(self, address: str, underlay: Underlay, tried_sizes: Collection[int]) -> set[int]:
        header_bytes = overhead(underlay.address) + IP_UDP_BYTES
        async with asyncio.TaskGroup() as group:
            probes = {
                size: group.create_task(self._probe_socket.probe(address, size=size - header_bytes))
                for size in tried_sizes
            }
        return {size for size, task in probes.items() if task.result().arrived}

    # --- checksums --------------------------------------------------------------------------------------------

    async def _checksum_outcome(self, peer: PathPeer, address: str, *, is_thorough: bool) -> Outcome:
        """Probe with checksums.  If the network card is at fault, switch offload off."""
        if is_thorough:
            self._verified_by_tcp.discard(peer.node_id)
        outcome = await self._probe_with_checksums(peer, address, SMALL_TRIES)
        if is_suspect(self.offload, peer.node_id, bare_arrives=True, checked_arrives=outcome.arrived):
            await self._test_card(peer, address)
            outcome = await self._probe_with_checksums(peer, address, SMALL_TRIES)
        if outcome.arrived:
            self.offload = after_success(self.offload, peer.node_id)
        return outcome

    async def _probe_with_checksums(self, peer: PathPeer, address: str, tries: int) -> Outcome:
        outcome = await self._probe_socket.probe(address, tries=tries, has_checksum=True)
        if outcome.arrived and peer.node_id not in self._verified_by_tcp:
            transferred = await self._transfer(peer, address, CHECK_BYTES)
            if transferred.is_lost:
                return Outcome(sent=outcome.sent, answered=0)
            if transferred.bytes:  # otherwise the receiver was busy, which proves nothing
                self._verified_by_tcp.add(peer.node_id)
        return outcome

    async def _transfer(self, peer: PathPeer, address: str, most: int) -> Transfer:
        targets, underlay = self._targets, self._underlay
        mtu = self.measured.own.get(peer.node_id, 0)
        if targets is None or underlay is None or not mtu:
            return Transfer()
        own = address_of(targets.node.node_id)
        try:
            sender = await self._namespaces.run(
                self._namespace.path, open_sender, own, mtu - overhead(underlay.address)
            )
        except OSError as error:
            log.warning("no connection inside vxlan", peer=peer.node_id, reason=str(error))
            return Transfer()
        return await transfer(sender, (address, PORT), self._clock, most=most)

    async def _test_card(self, peer: PathPeer, address: str) -> None:
        async with self._testing:
            if self.offload.is_off:  # a trial with another peer has already found the card broken
                return
            arrived: list[bool] = []
            try:
                for by_card in TRIALS:
                    await self._set_offloads(by_card)
                    self._verified_by_tcp.discard(peer.node_id)
                    arrived.append((await self._probe_with_checksums(peer, address, _TRIAL_TRIES)).arrived)
                    if arrived[-1] is by_card:  # a broken card loses exactly the packets with its checksums
                        break
                self.offload = after_trials(self.offload, peer.node_id, arrived)
            except (SkepError, OSError) as error:
                log.warning("checksum offload not tested", reason=str(error))
            finally:
                with suppress(SkepError, OSError):  # this is repeated with the next targets
                    await self._set_offloads(not self.offload.is_off)
        if self.offload.is_off:
            log.warning("checksum offload switched off: wrong checksums inside vxlan", peer=peer.node_id)

    async def _set_offloads(self, tried_sizes: bool) -> None:
        async with self._applying:
            self._has_offloads = tried_sizes
            if self._targets is not None and self._targets.node.data_path:
                await self._apply(self._targets)
