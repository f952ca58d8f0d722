"""What arrives through VXLAN at each peer: asked in the probes' namespace, and remembered.

The order matters: small packets first; where they arrive, how large packets may be; only then what has a checksum, in
packets that are not too large.
"""

import asyncio
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress

import msgspec
import structlog

from skep.aio.clock import Clock
from skep.dataplane.netns.namespaces import Namespaces
from skep.dataplane.plan.overlay import Underlay
from skep.dataplane.plan.probe import IP_UDP_BYTES, PORT, address_of, number_of, overhead, reached
from skep.dataplane.probe.bulk import BYTES_MAX, Carried, Sink, carry, connecting
from skep.dataplane.probe.findings import checksum_finding, large_finding, overlay_finding
from skep.dataplane.probe.mtu import Measured, after, again, first_range, path_mtu, sizes
from skep.dataplane.probe.namespace import ProbeNamespace
from skep.dataplane.probe.offload import TRIALS, Offload, after_success, after_trials, is_suspect
from skep.dataplane.probe.packets import Outcome, Said
from skep.dataplane.probe.probe_socket import ProbeSocket, Sockets
from skep.errors import SkepError
from skep.model.ids import NodeId
from skep.model.paths import PathFinding, PathPeer, ProbeTargets

log = structlog.get_logger()

SMALL_TRIES = 3
THOROUGH_TRIES = 10
HEARD_S = 25.0
"""A peer asks every ten seconds."""
CHECK_BYTES = 1 << 18
"""What a connection carries to see whether TCP's large segments arrive: many of them."""
_TRIAL_TRIES = 5


class DataPath:
    """The data path of one node.  ``numbers``: random, of 64 bits."""

    def __init__(
        self, namespace: ProbeNamespace, namespaces: Namespaces, clock: Clock, numbers: Callable[[], int]
    ) -> None:
        self._namespace = namespace
        self._namespaces = namespaces
        self._probe_socket = ProbeSocket(clock, self.said, numbers)
        self._clock = clock
        self._targets: ProbeTargets | None = None
        self._underlay: Underlay | None = None
        self._reached: dict[NodeId, str] = {}
        self._sockets: Sockets | None = None
        self._sockets_of: tuple[str, int] | None = None
        self._server: asyncio.Server | None = None
        self._connections: set[Sink] = set()
        self._applying = asyncio.Lock()
        self._trying = asyncio.Lock()
        self._left_to_card: bool | None = None
        self._carries: set[NodeId] = set()
        self.failure = ""
        """Why nobody can be asked at present; empty: nothing is wrong."""
        self.measured = Measured()
        self.offload = Offload()

    def said(self) -> Said:
        """What others are told: the MTU of this node's device, and to whom less arrives."""
        mtu = self._underlay.mtu if self._underlay is not None else 0
        own = self.measured.own
        return Said(mtu, {number_of(id): found for id, found in own.items() if 0 < found < mtu})

    def between(self, node: NodeId, nodes: Collection[NodeId], underlay: Underlay) -> Underlay:
        """``underlay`` as it is between ``nodes``, ``node`` (this one) among them."""
        mtu = path_mtu(self.measured, nodes, node, underlay.mtu)
        return msgspec.structs.replace(underlay, mtu=mtu, offloads=False if self.offload.is_off else None)

    # --- place ------------------------------------------------------------------------------------------------

    async def settle(self, targets: ProbeTargets | None) -> str:
        """Be able to ask those of ``targets``, and answer them; what keeps this node from it, empty: nothing."""
        async with self._applying:
            self._targets = targets
            self._forget_others()
            try:
                if targets is None or not targets.node.data_path:
                    self.close()
                    self._underlay = None
                    await self._namespace.remove()
                else:
                    await self._settle(targets)
            except (SkepError, OSError) as error:
                self.failure = str(error)
            else:
                self.failure = ""
            return self.failure

    async def _settle(self, targets: ProbeTargets) -> None:
        self._underlay = await self._namespace.settle(targets, left_to_card=self._left_to_card)
        if self._left_to_card is None:
            # What an earlier process found out is seen at the device; a new one leaves checksums to the card.
            self._left_to_card = await self._namespace.is_left_to_card()
            self.offload = Offload(is_off=not self._left_to_card)
        address = address_of(targets.node.node_id)
        if self._sockets_of != (address, self._namespace.identity()):
            self.close()
            self._sockets = await self._namespace.sockets(address)
            self._probe_socket.use(self._sockets)
            self._server = await asyncio.get_running_loop().create_server(
                lambda: Sink(self._probe_socket.knows, self._connections), sock=self._sockets.listening
            )
            self._sockets_of = (address, self._namespace.identity())
        found = reached(targets)
        self._reached = {peer.node_id: address for address, peer in found.items()}
        self._probe_socket.know(found.keys())

    def _forget_others(self) -> None:
        peers = {peer.node_id for peer in self._targets.peers} if self._targets is not None else set()
        self.measured = Measured(
            {id: mtu for id, mtu in self.measured.own.items() if id in peers},
            {id: said for id, said in self.measured.said.items() if id in peers},
        )
        self._carries &= peers
        self._reached = {id: address for id, address in self._reached.items() if id in peers}

    def close(self) -> None:
        """Ask and answer no more; the device stays."""
        self._probe_socket.rest()
        for one in tuple(self._connections):
            one.abort()
        if self._server is not None:
            self._server.close()
        if self._sockets is not None:
            self._sockets.close()
        self._sockets, self._sockets_of, self._server = None, None, None

    # --- asking -----------------------------------------------------------------------------------------------

    async def findings(self, peer: PathPeer, *, is_thorough: bool) -> Sequence[PathFinding]:
        """What arrives at ``peer``; empty: it is not reached by VXLAN, or not told of yet."""
        address, underlay = self._reached.get(peer.node_id), self._underlay
        if self.failure and peer.data_path:
            nothing = Outcome(sent=1, answered=0, error=self.failure)
            return (overlay_finding(peer, nothing, is_heard=False),)
        if address is None or underlay is None:
            return ()
        tries = THOROUGH_TRIES if is_thorough else SMALL_TRIES
        small = await self._probe_socket.ask(address, tries=tries, enough=tries)
        found = [
            overlay_finding(peer, small, is_heard=self._probe_socket.heard_within(address, HEARD_S)),
        ]
        if not small.arrived:
            self._carries.discard(peer.node_id)
            return found
        mtu, tried = await self._mtu(peer, address, underlay)
        self._note(peer.node_id, mtu, small.said)
        found.append(large_finding(peer, mtu, underlay.mtu, tried))
        if mtu:
            checked = await self._checked(peer, address, is_thorough=is_thorough)
            found.append(checksum_finding(peer, checked, is_off=self.offload.is_off))
        return found

    async def throughput(self, peer: PathPeer) -> int:
        """Bytes per second to ``peer``; 0: they do not arrive."""
        address = self._reached.get(peer.node_id)
        return (await self._carried(peer, address, BYTES_MAX)).per_s if address is not None else 0

    def _note(self, peer: NodeId, mtu: int, said: Said | None) -> None:
        own = {**self.measured.own, peer: mtu} if mtu else self.measured.own
        heard = {**self.measured.said, peer: said} if said is not None else self.measured.said
        if peer in self._reached:  # it may have gone meanwhile
            self.measured = Measured(own, heard)

    async def _mtu(self, peer: PathPeer, address: str, underlay: Underlay) -> tuple[int, int]:
        """What arrives in one piece (0: nothing of at least ``MTU_MIN``), and how many sizes were tried."""
        known, tried = first_range(underlay.mtu), 0
        before = min(self.measured.own.get(peer.node_id, 0), underlay.mtu)
        if before:
            wanted = again(before, underlay.mtu)
            arrived = await self._arriving(address, underlay, wanted)
            tried = len(wanted)
            if arrived and max(arrived) == before:
                return before, tried
            known = after(known, wanted, arrived) if arrived else known
        while wanted := sizes(known):
            arrived = await self._arriving(address, underlay, wanted)
            tried += len(wanted)
            known = after(known, wanted, arrived)
        return known.arrives, tried

    async def _arriving(self, address: str, underlay: Underlay, wanted: Collection[int]) -> set[int]:
        around = overhead(underlay.address) + IP_UDP_BYTES
        async with asyncio.TaskGroup() as group:
            asking = {
                size: group.create_task(self._probe_socket.ask(address, size=size - around))
                for size in wanted
            }
        return {size for size, task in asking.items() if task.result().arrived}

    # --- checksums --------------------------------------------------------------------------------------------

    async def _checked(self, peer: PathPeer, address: str, *, is_thorough: bool) -> Outcome:
        """Whether packets with checksums arrive; a network card that is at fault is found and asked no more."""
        if is_thorough:
            self._carries.discard(peer.node_id)
        outcome = await self._ask_checked(peer, address, SMALL_TRIES)
        if is_suspect(self.offload, peer.node_id, bare_arrives=True, checked_arrives=outcome.arrived):
            await self._try_card(peer, address)
            outcome = await self._ask_checked(peer, address, SMALL_TRIES)
        if outcome.arrived:
            self.offload = after_success(self.offload, peer.node_id)
        return outcome

    async def _ask_checked(self, peer: PathPeer, address: str, tries: int) -> Outcome:
        outcome = await self._probe_socket.ask(address, tries=tries, has_checksum=True)
        if outcome.arrived and peer.node_id not in self._carries:
            carried = await self._carried(peer, address, CHECK_BYTES)
            if carried.is_lost:
                return Outcome(sent=outcome.sent, answered=0)
            if carried.bytes:  # otherwise the other end was busy, which says nothing
                self._carries.add(peer.node_id)
        return outcome

    async def _carried(self, peer: PathPeer, address: str, most: int) -> Carried:
        targets, underlay = self._targets, self._underlay
        mtu = self.measured.own.get(peer.node_id, 0)
        if targets is None or underlay is None or not mtu:
            return Carried()
        own = address_of(targets.node.node_id)
        try:
            opened = await self._namespaces.run(
                self._namespace.path, connecting, own, mtu - overhead(underlay.address)
            )
        except OSError as error:
            log.warning("no connection inside VXLAN", peer=peer.node_id, reason=str(error))
            return Carried()
        return await carry(opened, (address, PORT), self._clock, most=most)

    async def _try_card(self, peer: PathPeer, address: str) -> None:
        async with self._trying:
            if self.offload.is_off:  # another peer's trial
                return
            arrived: list[bool] = []
            try:
                for left_to_card in TRIALS:
                    await self._leave_to_card(left_to_card)
                    self._carries.discard(peer.node_id)
                    arrived.append((await self._ask_checked(peer, address, _TRIAL_TRIES)).arrived)
                    if (
                        arrived[-1] is left_to_card
                    ):  # a broken card loses them if, and only if, they are left to it
                        break
                self.offload = after_trials(self.offload, peer.node_id, arrived)
            except (SkepError, OSError) as error:
                log.warning("checksum offload not tried", reason=str(error))
            finally:
                with suppress(SkepError, OSError):  # the next settling tries again
                    await self._leave_to_card(not self.offload.is_off)
        if self.offload.is_off:
            log.warning(
                "the network card computes wrong checksums inside VXLAN, offload is off", peer=peer.node_id
            )

    async def _leave_to_card(self, wanted: bool) -> None:
        async with self._applying:
            self._left_to_card = wanted
            if self._targets is not None and self._targets.node.data_path:
                await self._settle(self._targets)
