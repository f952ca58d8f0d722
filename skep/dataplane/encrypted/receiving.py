"""From the other nodes to the TAPs.  Every byte that arrives may be an enemy's."""

import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from threading import Lock

from skep.dataplane.encrypted.answers import is_neighbours_talk
from skep.dataplane.encrypted.counters import Counters
from skep.dataplane.encrypted.frames import (
    ETHERNET_BYTES,
    FRAME_BYTES_MAX,
    GREETING,
    HEADER,
    LENGTH,
    TAG_BYTES,
    VERSION,
    VNET_BYTES,
    Header,
    associated,
    echo_answer,
    echo_asked,
    parse,
    run_length,
    unpack,
)
from skep.dataplane.encrypted.peer import Peer
from skep.dataplane.encrypted.routes import Carrier, Routes

SOL_UDP, UDP_GRO = 17, 104
_DATAGRAM_BYTES_MAX = 1 << 16
_ANCILLARY_BYTES = 64
_DATAGRAMS_PER_TURN = 64
_UNIT_BYTES_MAX = LENGTH.size + FRAME_BYTES_MAX + TAG_BYTES


class Receiver:
    """Opens what arrives and writes the frames.  The carrying thread's.

    Args:
        lock: held while a peer is changed (greetings here, plans on the controlling thread).
        now: monotonic seconds.
    """

    def __init__(
        self, sock: socket.socket, routes: Callable[[], Routes], lock: Lock, now: Callable[[], float]
    ) -> None:
        self.counters = Counters()
        self._socket = sock
        self._routes = routes
        self._lock = lock
        self._now = now

    def turn(self) -> None:
        """Take what waits in the socket, up to 64 calls' worth."""
        for _ in range(_DATAGRAMS_PER_TURN):
            try:
                data, ancillary, _, source = self._socket.recvmsg(
                    _DATAGRAM_BYTES_MAX, _ANCILLARY_BYTES, socket.MSG_DONTWAIT
                )
            except BlockingIOError:
                return
            except OSError:
                self.counters.drop("not received")
                return
            self.receive(data, _segment_bytes(ancillary) or len(data), source[0], source)

    def receive(self, data: bytes, segment: int, sender: str, source: tuple[str, int]) -> None:
        """Datagrams of ``segment`` bytes each (the last may be shorter) that arrived joined together."""
        routes = self._routes()
        peer = routes.peers.get(sender)
        if peer is None:
            self.counters.drop("stranger")
            return
        segment = max(segment, 1)
        view = memoryview(data)
        start = 0
        while start < len(data):
            datagram = view[start : start + segment]
            header = parse(datagram)
            taken = 1
            if header is not None:
                taken = run_length(data, start, segment, header) if header.pieces > 1 else 1
                ends = range(start, start + taken * segment, segment)
                self._pieces(routes, peer, header, [view[at + HEADER.size : at + segment] for at in ends])
            elif len(datagram) > 1 and datagram[0] == VERSION and datagram[1] == GREETING:
                self._greeted(peer, datagram, source)
            elif (number := echo_asked(datagram)) is not None:
                self._echo(peer, number, source)
            else:
                self.counters.drop("malformed")
            start += taken * segment

    def _greeted(self, peer: Peer, datagram: memoryview, source: tuple[str, int]) -> None:
        with self._lock:
            is_genuine, reply = peer.greeted(datagram, self._now())
        if not is_genuine:
            self.counters.drop("greeting refused")
        if reply is not None:
            try:
                self._socket.sendto(reply, source)
            except OSError:
                self.counters.drop("not sent")

    def _echo(self, peer: Peer, number: int, source: tuple[str, int]) -> None:
        """A node of ours asks whether it can reach this one."""
        with self._lock:
            may_answer = peer.may_echo(self._now())
        if may_answer:
            try:
                self._socket.sendto(echo_answer(number), source)
            except OSError:
                self.counters.drop("not sent")

    def _pieces(self, routes: Routes, peer: Peer, header: Header, parts: Sequence[memoryview]) -> None:
        """Consecutive pieces of one unit; ``header``: of the first of them."""
        if header.pieces * len(parts[0]) > _UNIT_BYTES_MAX + len(parts[0]):
            self.counters.drop("malformed")
            return
        opener = peer.opener(header.epoch, header.session)
        if opener is None:
            self._unknown(peer, header)
            return
        if not opener.may_open(header.counter):
            self.counters.drop("replayed")
            return
        sealed: bytes | memoryview
        if header.pieces == 1:
            sealed = parts[0]
        elif header.pieces == len(parts):
            sealed = b"".join(parts)
        else:
            kept = [bytes(part) for part in parts]
            whole = opener.reassembly.add(header, kept)
            if whole is None:
                return
            sealed = b"".join(whole)
        content = opener.open(header.counter, associated(header), sealed)
        if content is None:
            self.counters.drop("forged")
            return
        carrier = routes.by_vni.get(header.network)
        if carrier is None:
            self.counters.drop("unknown network")
            return
        self.counters.units += 1
        for frame in self._own_frames(carrier, peer, memoryview(content)):
            try:
                os.write(carrier.tap, frame)
            except OSError:
                self.counters.drop("not delivered")

    def _own_frames(self, carrier: Carrier, peer: Peer, content: memoryview) -> Iterator[memoryview]:
        """Frames whose sender's address is that of a container on ``peer``: nobody speaks for another node's."""
        for frame in unpack(content):
            if len(frame) < VNET_BYTES + ETHERNET_BYTES:
                self.counters.drop("malformed")
            elif is_neighbours_talk(frame):
                self.counters.drop("neighbours' talk")
            elif carrier.sources.get(bytes(frame[VNET_BYTES + 6 : VNET_BYTES + 12])) is not peer:
                self.counters.drop("another's address")
            else:
                self.counters.frames += 1
                yield frame

    def _unknown(self, peer: Peer, header: Header) -> None:
        """One of the two has begun anew, or does not know the other's keys yet: greetings settle it."""
        self.counters.drop("unknown session" if peer.has_epoch(header.epoch) else "unknown epoch")
        with self._lock:
            peer.ask(self._now())


def _segment_bytes(ancillary: list[tuple[int, int, bytes]]) -> int:
    """How long each of the datagrams is that the kernel has joined; 0: it has not."""
    for level, kind, value in ancillary:
        if level == SOL_UDP and kind == UDP_GRO:
            (size,) = struct.unpack("i" if len(value) >= 4 else "H", value[:4])
            return int(size)
    return 0
