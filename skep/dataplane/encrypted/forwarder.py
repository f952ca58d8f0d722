"""The forwarder: TAP devices on one side, UDP on the other, and the thread between them.

One thread carries in both directions, and the caller's applies plans and lets peers be greeted (``tick``).  Two
threads, one for each direction, were tried: they carry no faster, since the interpreter lets one work at a time, cost
a quarter more processor time, and give what waits less time to be sealed together.  The carrying thread sees one
immutable ``Routes`` at a time; what changes a peer holds the lock.
"""

import os
import select
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

import msgspec
import structlog

from skep.dataplane.encrypted.counters import Counts, counts
from skep.dataplane.encrypted.frames import PIECE_BYTES_MIN, piece_bytes
from skep.dataplane.encrypted.peer import Peer
from skep.dataplane.encrypted.plan import Plan, PlannedPeer, PlannedSegment
from skep.dataplane.encrypted.receiving import SOL_UDP, UDP_GRO, Receiver
from skep.dataplane.encrypted.routes import Carrier, Routes, carrier, sources
from skep.dataplane.encrypted.sending import Sender
from skep.dataplane.encrypted.taps import is_attached, open_tap
from skep.model.ids import NodeId

log = structlog.get_logger(__name__)

TICK_S = 0.05
_BUFFER_BYTES = 8 << 20
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_CLOSE_AFTER_S = 1.0
"""A descriptor may still be in use by a turn that began before; a turn takes milliseconds."""
_WAIT_S = 0.5
"""After which the carrying thread looks whether it is to end."""
_LOOK_S = 1.0
"""Between two looks whether all devices are still there."""
_PIECE_BYTES_MAX = 65000


class PeerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How it stands with one peer.  ``epoch``: that of what is sent to it; -1: nothing is."""

    node_id: NodeId
    address: str
    is_agreed: bool
    epoch: int = -1


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """What ``skep doctor`` and the tests ask for."""

    counts: Counts = Counts()
    peers: tuple[PeerStatus, ...] = ()
    segments: tuple[int, ...] = ()
    """VNIs that have their device."""
    trouble: dict[int, str] = {}
    """By VNI: why its device is not there."""


class _Device(msgspec.Struct, frozen=True):
    """A TAP that is open.  ``namespace``: inode, since a path may mean another namespace tomorrow."""

    name: str
    namespace: int
    tap: int


class Forwarder:
    """One node's.  ``start`` needs the address to be there; ``apply`` may be called again and again.

    Args:
        random_bytes: the system's; keys are made of it.
        chance: from 0 to 1; spreads greetings.
        now: monotonic seconds.
    """

    def __init__(
        self, random_bytes: Callable[[int], bytes], chance: Callable[[], float], now: Callable[[], float]
    ) -> None:
        self._random_bytes = random_bytes
        self._chance = chance
        self._now = now
        self._lock = threading.Lock()
        self._routes = Routes()
        self._peers: dict[NodeId, Peer] = {}
        self._devices: dict[int, _Device] = {}
        self._trouble: dict[int, str] = {}
        self._retired: list[tuple[float, int]] = []
        self._plan = Plan()
        self._bound: tuple[str, int] | None = None
        self._look_at = 0.0
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        """What the carrying thread died of."""
        self._poll: select.epoll | None = None
        self._socket: socket.socket | None = None
        self._sender: Sender | None = None
        self._receiver: Receiver | None = None

    def apply(self, plan: Plan) -> None:
        """Do as ``plan`` says from now on.

        A segment whose device cannot be made is left out, tried again by ``tick``, and named in ``status``.

        Raises: OSError: the address is not this machine's, or the port is taken; ``tick`` tries that again, too.
        """
        self._plan = plan
        with self._lock:
            self._use_peers(plan)
        self._use_segments(plan)
        self._listen_where_planned()

    def tick(self) -> None:
        """Greet who is to be greeted, make what could not be made; every ``TICK_S``.

        Raises: RuntimeError: nothing is carried any more, and only a new process will.
        """
        if self._failure is not None:
            raise RuntimeError("the carrying thread has died") from self._failure
        now = self._now()
        if self._socket is not None:
            with self._lock:
                due = [(peer.address, data) for peer in self._peers.values() if (data := peer.due(now))]
            for address, data in due:
                with suppress(OSError):  # it is said again
                    self._socket.sendto(data, (address, self._plan.port))
        if now >= self._look_at:
            self._look_at = now + _LOOK_S
            if self._wrong_devices():
                self._use_segments(self._plan)
            with suppress(OSError):
                self._listen_where_planned()
        while self._retired and self._retired[0][0] <= now:
            os.close(self._retired.pop(0)[1])

    def status(self) -> Status:
        """How it stands now."""
        if self._sender is None or self._receiver is None:
            return Status(trouble=dict(self._trouble))
        with self._lock:
            peers = tuple(
                PeerStatus(
                    node_id=peer.node_id,
                    address=peer.address,
                    is_agreed=peer.is_agreed,
                    epoch=peer.sealer.epoch if peer.sealer else -1,
                )
                for peer in self._peers.values()
            )
            lost = sum(peer.lost for peer in self._peers.values())
        return Status(
            counts=counts(self._sender.counters, self._receiver.counters, lost),
            peers=peers,
            segments=tuple(sorted(self._routes.by_vni)),
            trouble=dict(self._trouble),
        )

    def close(self) -> None:
        """End the thread and close everything; devices stay where they are."""
        self._end_thread()
        for device in self._devices.values():
            os.close(device.tap)
        for _, tap in self._retired:
            os.close(tap)
        self._devices, self._retired = {}, []

    def _listen_where_planned(self) -> None:
        plan = self._plan
        if plan.address and (plan.address, plan.port) != self._bound:
            self._listen(plan.address, plan.port)

    def _listen(self, address: str, port: int) -> None:
        self._end_thread()
        self._socket = _opened(address, port)
        self._bound = (address, port)
        self._sender = sender = Sender(self._socket, port)
        self._receiver = receiver = Receiver(self._socket, lambda: self._routes, self._lock, self._now)
        self._poll = poll = select.epoll()
        poll.register(self._socket, select.EPOLLIN)
        for device in self._devices.values():
            self._watch(device.tap)
        self._is_over = is_over = threading.Event()

        def carry() -> None:
            try:
                while not is_over.is_set():
                    for ready, _ in poll.poll(_WAIT_S):
                        self._turn(ready, sender, receiver)
            except BaseException as error:  # nobody waits for this thread: ``tick`` says it
                self._failure = error

        self._thread = threading.Thread(target=carry, name="carry")
        self._thread.start()

    def _turn(self, ready: int, sender: Sender, receiver: Receiver) -> None:
        """Something waits at a TAP, or at the socket; on the carrying thread."""
        routes = self._routes
        carrier = routes.by_tap.get(ready)
        if carrier is None:
            receiver.turn()
        elif not sender.turn(carrier, routes.piece):
            self._unwatch(ready)  # it was deleted: the next look makes it anew

    def _watch(self, tap: int) -> None:
        if self._poll is not None:
            self._poll.register(tap, select.EPOLLIN)

    def _unwatch(self, tap: int) -> None:
        """Again and again is harmless."""
        if self._poll is not None:
            with suppress(OSError):
                self._poll.unregister(tap)

    def _end_thread(self) -> None:
        self._is_over.set()
        if self._thread is not None:
            self._thread.join()
        if self._poll is not None:
            self._poll.close()
        if self._socket is not None:
            self._socket.close()
        self._thread = self._poll = self._socket = self._bound = self._sender = self._receiver = None

    def _use_peers(self, plan: Plan) -> None:
        """Peers that stay keep their sessions; one at another address begins anew.

        Of two at one address the one that was there before is a peer, else the first: what arrives from there can be
        of one only.
        """
        now = self._now()
        kept: dict[NodeId, Peer] = {}
        taken: dict[str, NodeId] = {}
        for planned in sorted(plan.peers, key=lambda one: not self._is_peer_at(one)):
            if taken.setdefault(planned.address, planned.node_id) != planned.node_id:
                log.warning(
                    "two nodes at one address: one left out",
                    address=planned.address,
                    node=planned.node_id,
                    peer=taken[planned.address],
                )
                continue
            peer = self._peers.get(planned.node_id)
            if peer is None or peer.address != planned.address:
                peer = Peer(
                    planned.node_id,
                    planned.address,
                    random_bytes=self._random_bytes,
                    chance=self._chance,
                    now=now,
                )
            peer.use(planned.keys, now)
            kept[planned.node_id] = peer
        self._peers = kept

    def _is_peer_at(self, planned: PlannedPeer) -> bool:
        peer = self._peers.get(planned.node_id)
        return peer is not None and peer.address == planned.address

    def _use_segments(self, plan: Plan) -> None:
        """Open what is missing, put the new routes in place, then take away what is left over."""
        wrong = self._wrong_devices()
        owners = sources(plan.segments, self._peers)
        carriers: dict[int, Carrier] = {}
        devices: dict[int, _Device] = {}
        self._trouble = {}
        for segment in plan.segments:
            device = None if segment.vni in wrong else self._devices.get(segment.vni)
            if device is None:
                try:
                    device = _device(segment)
                except OSError as error:
                    self._trouble[segment.vni] = f"device {segment.device}: {error.strerror or error}"
                    continue
            devices[segment.vni] = device
            carriers[segment.vni] = carrier(segment, device.tap, self._peers, owners[segment.namespace])
        surplus = [device for vni, device in self._devices.items() if devices.get(vni) is not device]
        fresh = [device for vni, device in devices.items() if self._devices.get(vni) is not device]
        self._devices = devices
        self._routes = self._routes_of(plan, carriers)
        for device in surplus:
            self._unwatch(device.tap)
            self._retired.append((self._now() + _CLOSE_AFTER_S, device.tap))
        for device in fresh:
            self._watch(device.tap)

    def _routes_of(self, plan: Plan, carriers: Mapping[int, Carrier]) -> Routes:
        is_ipv6 = ":" in plan.address
        piece = piece_bytes(plan.mtu, is_ipv6=is_ipv6)
        return Routes(
            by_tap={one.tap: one for one in carriers.values()},
            by_vni=carriers,
            peers={peer.address: peer for peer in self._peers.values()},
            piece=max(PIECE_BYTES_MIN, min(piece, _PIECE_BYTES_MAX)),
        )

    def _wrong_devices(self) -> set[int]:
        """Segments whose device is missing, was deleted, or lies in a namespace that was made anew."""
        wrong = set()
        for segment in self._plan.segments:
            device = self._devices.get(segment.vni)
            is_right = (
                device is not None
                and device.name == segment.device
                and device.namespace == _inode(segment.namespace)
                and is_attached(device.tap)
            )
            if not is_right:
                wrong.add(segment.vni)
        return wrong


def _device(segment: PlannedSegment) -> _Device:
    namespace = Path(segment.namespace)
    inode = namespace.stat().st_ino
    return _Device(segment.device, inode, open_tap(namespace, segment.device))


def _inode(path: str) -> int:
    try:
        return Path(path).stat().st_ino
    except OSError:
        return 0


def _opened(address: str, port: int) -> socket.socket:
    """The UDP socket that pieces leave from and arrive at.  Raises: OSError."""
    family = socket.AF_INET6 if ip_address(address).version == 6 else socket.AF_INET
    opened = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        for option in (_SO_SNDBUFFORCE, _SO_RCVBUFFORCE):
            with suppress(OSError):  # without CAP_NET_ADMIN what the system grants has to do
                opened.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
        with suppress(OSError):  # older kernels give each datagram alone
            opened.setsockopt(SOL_UDP, UDP_GRO, 1)
        opened.bind((address, port))
    except BaseException:
        opened.close()
        raise
    return opened
